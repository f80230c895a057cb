#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "bottle>=0.13.4",
#   "PyJWT[crypto]>=2.15.1",
#   "PyMySQL[rsa]>=1.2.4",
#   "waitress>=3.0.2",
# ]
# ///
"""JWT sign-in for REST APIs on small hosts, in one file.

    python server.py --demo
    TOKEN=$(curl -s -d username=roy -d password=roy http://127.0.0.1:5000/auth | cut -d'"' -f4)
    curl -H "Authorization: Bearer $TOKEN" http://127.0.0.1:5000/rest-auth

    POST   /auth               user name and password for an access token and a refresh token
    POST   /auth/refresh       a refresh token for a new pair
    POST   /auth/logout        end this session, the others, or all
    GET    /auth/me            who is calling, in which session
    PUT    /auth/password      change one's password; all other sessions end
    GET    /auth/sessions      one's sessions
    DELETE /auth/sessions/ID   end one
    POST   /auth/tokens        a named API token for a script
    GET    /rest-auth          the tutorial's protected route
    GET    /.well-known/jwks.json   the public keys
    GET    /health             200 while the database answers, else 503
    GET    /metrics            on a port of its own, where the setting `metrics` names one: for Prometheus

The rooms below come in reading order; each uses only those above it.
"""

import argparse
import base64
import collections
import contextlib
import dataclasses
import datetime
import difflib
import errno
import fcntl
import functools
import getpass
import hashlib
import hmac
import importlib.util
import inspect
import ipaddress
import itertools
import json
import logging
import math
import mmap
import os
import re
import resource
import secrets
import signal
import socket
import sqlite3
import stat
import sys
import threading
import time
import unicodedata
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import jwt
import pymysql
import waitress
import waitress.utilities
from bottle import Bottle, HTTPResponse, PluginError, request, response
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.proxy_headers import proxy_headers_middleware

__version__ = "0.1.0"

# --- Events ---
# What happened is one line of JSON on the logger `auth`. With the setting `metrics` it is counted
# as well, in memory that the processes of one service share: whichever is asked tells of all.

log = logging.getLogger("auth")


def event(what, /, level=logging.INFO, **facts):
    """Log one line of JSON: whatever a client puts into a name or a header stays inside its quotes. And count it."""
    count(f'events_total{{event="{what}"}}')
    stamp = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
    log.log(level, json.dumps({"time": stamp, "event": what, **facts}))


class Counters:
    """Numbers by name, such as `events_total{event="login"}`; {} around labels as Prometheus writes them."""

    def __init__(self, names, processes):
        self._slots = {name: slot for slot, name in enumerate(names)}
        self._memory = mmap.mmap(-1, 8 * len(self._slots) * processes)
        self._numbers = memoryview(self._memory).cast("Q")
        self._lock = threading.Lock()
        self.place = 0  # of this process among them

    def set(self, name, number):
        """Set the number of this process; a name that is not among those known is left out."""
        self._change(name, lambda _: number)

    def add(self, name):
        """Add one to the number of this process, as above."""
        self._change(name, lambda number: number + 1)

    def _change(self, name, change):
        slot = self._slots.get(name)
        if slot is not None:
            slot += self.place * len(self._slots)
            with self._lock:
                self._numbers[slot] = change(self._numbers[slot])

    def by_process(self, name):
        return self._numbers[self._slots[name] :: len(self._slots)].tolist()

    def totals(self):
        """{name: number}, without those that are 0."""
        return {name: total for name in self._slots if (total := sum(self.by_process(name)))}


counters = None  # Counters where the setting `metrics` asks for them


def count(name):
    if counters:
        counters.add(name)


def gauge(name, number):
    if counters:
        counters.set(name, number)


EVENTS = """login login_failed throttled refresh reuse_detected logout password_changed token_created user_added
    user_locked user_unlocked user_removed users_imported user_ambiguous upgrade_failed key_rotated key_retired
    key_file_refused jwks_error x_forwarded_for_untrusted database_error database_back database_host_failed
    database_host_back process_died""".split()


# --- Settings ---
# Every knob once, with its unit and its reason. The field token_ttl is the flag --token-ttl and
# the variable AUTH_TOKEN_TTL. A misspelt or impossible setting stops the start: a door that is
# set up by guesswork is worse than one that does not open.


DAY = 86400  # seconds
REMEMBERED = 4096  # verified tokens, and sessions, that a process remembers: a few MiB
LOTS = 10**9


class SettingsError(ValueError):
    """The operator has to mend something before this can run; the text says what and how."""


def setting(default, meaning, between=None, shown=True, flag=True):
    """A field of Settings: `between` bounds an integer; a value that may hold a secret is not `shown` in the repr."""
    metadata = {"meaning": meaning, "between": between, "flag": flag}
    return dataclasses.field(default=default, repr=shown, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings, checked when made: Settings(token_ttl=60), or Settings.load() to read the environment."""

    database: str = setting(
        "sqlite:///auth.db", "sqlite:///FILE, or mysql://USER:PASSWORD@HOST:PORT/NAME; sqlite:// is memory", shown=False
    )
    host: str = setting("127.0.0.1", "address to listen on, or the absolute path of a unix socket")
    port: int = setting(5000, "port to listen on; 0 takes a free one", (0, 65535))
    secret_key: str = setting(
        "", "HS256 secret, at least 32 bytes; with a key file as well, that one signs", shown=False, flag=False
    )
    keys: str = setting("auth.keys", "key file, a private JWK Set; made on first start when there is no secret_key")
    token_ttl: int = setting(300, "seconds an access token lives", (1, DAY))
    session_ttl: int = setting(30 * DAY, "seconds a session lives from its last refresh on", (1, 3650 * DAY))
    session_max: int = setting(90 * DAY, "seconds a session lives at the most", (1, 3650 * DAY))
    session_cache: int = setting(
        0, "seconds for which MySQL is not asked again about a session; SQLite needs none", (0, 60)
    )
    connect_timeout: int = setting(5, "seconds to wait for a connection to MySQL", (1, 300))
    read_timeout: int = setting(7, "seconds to wait for an answer of MySQL", (1, 300))
    leeway: int = setting(10, "seconds that the clocks of two hosts may differ", (0, 300))
    pbkdf2_iterations: int = setting(600_000, "cost of a password hash; OWASP's floor", (1, 9_999_999))
    throttle_pair: int = setting(
        5, "failed sign-ins in a row by one name from one address, then waits; 0 is off", (0, LOTS)
    )
    throttle_address: int = setting(50, "failed sign-ins from one address in 10 minutes; 0 is off", (0, LOTS))
    throttle_name: int = setting(100, "failed sign-ins by one name in an hour, from new addresses; 0 is off", (0, LOTS))
    processes: int = setting(1, "processes that serve; more than there are cores are of no use", (1, 64))
    stop_timeout: int = setting(20, "seconds that running requests have to finish after SIGTERM", (0, 3600))
    threads: int = setting(16, "requests worked on at once, beside sign-ins", (1, 256))
    metrics: str = setting("", "PORT or ADDRESS:PORT for GET /metrics; without an address 127.0.0.1")
    trusted_proxy: str = setting("", "address of the proxy whose X-Forwarded-For and -Proto are believed")
    realm: str = setting("Login Required", "realm named in a 401")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_setting(field, getattr(self, field.name))
        database = parse_database(self.database)
        if self.processes > 1 and database.kind == "sqlite" and not database.name:
            raise SettingsError("processes: a database in memory is one process's own; leave it at 1, or name a file")
        if self.secret_key:
            check_secret(self.secret_key.encode("utf-8", "surrogateescape"))
        if not self.host:
            raise SettingsError("host: name an address; 0.0.0.0 is all of IPv4, :: all of IPv6")
        if self.metrics:
            parse_listener(self.metrics)
        if self.trusted_proxy not in ("", "localhost") and not is_address(self.trusted_proxy):
            raise SettingsError("trusted_proxy: give the one IP address that the proxy connects from")
        if '"' in self.realm or "\\" in self.realm or not self.realm.isprintable():
            raise SettingsError('realm: use printable characters other than " and \\')

    @classmethod
    def load(cls, environ=os.environ, **flags):
        """Settings from AUTH_ variables, overruled by `flags`. Raises SettingsError. An empty variable is unset."""
        fields = {f"AUTH_{field.name.upper()}": field for field in dataclasses.fields(cls)}
        for variable in environ:
            if variable.startswith("AUTH_") and variable not in fields:
                meant = difflib.get_close_matches(variable, fields, 1) or [", ".join(fields)]
                raise SettingsError(f"{variable} is no setting; did you mean {meant[0]}?")
        texts = {field.name: environ[variable] for variable, field in fields.items() if environ.get(variable)}
        types = {field.name: field.type for field in fields.values()}
        return cls(**{name: to_type(name, text, types[name]) for name, text in (texts | flags).items()})


def to_type(name, text, kind):
    try:
        return kind(text)
    except ValueError:
        raise SettingsError(f"{name}: {text!r} is not a whole number") from None


def check_setting(field, value):
    """Raise SettingsError unless the value has the field's type and lies between its bounds."""
    if type(value) is not field.type:
        raise SettingsError(f"{field.name}: give {field.type.__name__}, not {type(value).__name__}")
    between = field.metadata["between"]
    if between and not between[0] <= value <= between[1]:
        raise SettingsError(f"{field.name}: {value} is not between {between[0]} and {between[1]}")


def parse_listener(text):
    """("127.0.0.1", 9100) of "9100", or the address that it names. Raises SettingsError."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
    if not is_address(host) or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise SettingsError("metrics: give a port, such as 9100, or an IP address and a port, such as 10.0.0.5:9100")
    return host, int(port)


def is_address(text):
    try:
        return bool(ipaddress.ip_address(text))
    except ValueError:
        return False


def is_loopback(host):
    return host == "localhost" or host.startswith("/") or (is_address(host) and ipaddress.ip_address(host).is_loopback)


# Secrets that stand in tutorials and manuals: whoever signs with one lets everybody in.
PUBLISHED_SECRETS = {
    b"secret-key",
    b"super-secret",
    b"your-256-bit-secret",
    b"a-string-secret-at-least-256-bits-long",
    b"a-valid-string-secret-that-is-at-least-512-bits-long-which-is-very-long",
    b"09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7",
}
SECRET_MAKER = "python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"


def check_secret(secret):
    """Raise SettingsError for bytes that others know or could guess (RFC 7518, 3.2: 32 bytes for HS256)."""
    if secret in PUBLISHED_SECRETS:
        raise SettingsError(f"secret_key: this one is published; make your own: {SECRET_MAKER}")
    if len(secret) < 32:
        raise SettingsError(f"secret_key: shorter than 32 bytes; make a good one: {SECRET_MAKER}")
    if secret in (secret * 2)[1:-1]:
        raise SettingsError(f"secret_key: it repeats itself; make a good one: {SECRET_MAKER}")


@dataclasses.dataclass(frozen=True)
class Database:
    """A database URL taken apart; str() of it is fit for the eyes of all."""

    kind: str  # "sqlite" or "mysql"
    name: str  # SQLite: the file, "" for memory. MySQL: the database
    user: str = ""
    password: str = dataclasses.field(default="", repr=False)
    hosts: tuple = ()  # of (host, port), tried in this order
    options: dict = dataclasses.field(default_factory=dict)

    def __str__(self):
        if self.kind == "sqlite":
            return f"sqlite:///{self.name}" if self.name else "memory"
        hosts = ",".join(f"{host}:{port}" for host, port in self.hosts)
        return f"mysql://{self.user}@{self.options.get('unix_socket', hosts)}/{self.name}"


SQLITE_FORM = "sqlite:///FILE, with a fourth slash for an absolute path, or sqlite:// for memory"
MYSQL_FORM = "mysql://USER:PASSWORD@HOST:PORT/NAME, with % : @ / ? # in a password as %25 %3A %40 %2F %3F %23"
MYSQL_OPTIONS = ("unix_socket", "ssl_ca", "ssl_cert", "ssl_key", "ssl_verify_identity")


def parse_database(url):
    """Take a database URL apart. Raises SettingsError, which never repeats a part of it: any may hold a password."""
    try:
        if url.startswith("sqlite://"):
            return parse_sqlite(urlsplit(url))
        if url.startswith("mysql://"):
            return parse_mysql(urlsplit(url))
    except ValueError as error:
        why = error if isinstance(error, SettingsError) else f"write {MYSQL_FORM}"
        raise SettingsError(f"database: {why}") from None
    raise SettingsError("database: a URL begins with sqlite:// or mysql://, such as sqlite:///auth.db")


def parse_sqlite(parts):
    name = unquote(parts.path[1:])
    if parts.netloc or parts.query or parts.fragment or "\0" in name or (parts.path and not name):
        raise SettingsError(f"write {SQLITE_FORM}")
    return Database("sqlite", "" if name == ":memory:" else name)


def parse_mysql(parts):
    userinfo, _, hosts = parts.netloc.rpartition("@")
    user, _, password = userinfo.partition(":")
    name = unquote(parts.path[1:])
    if not user or not name or "/" in name or parts.fragment:
        raise SettingsError(f"write {MYSQL_FORM}")
    pairs = [urlsplit(f"//{host}") for host in hosts.split(",")]
    hosts = tuple((pair.hostname or "localhost", pair.port or 3306) for pair in pairs)
    options = parse_options(parse_qsl(parts.query, keep_blank_values=True))
    return Database("mysql", name, unquote(user), unquote(password), hosts, options)


def parse_options(pairs):
    """PyMySQL's own options, of the types that it wants."""
    options = dict(pairs)
    if not set(options) <= set(MYSQL_OPTIONS):
        raise SettingsError(f"an option after ? is none of {', '.join(MYSQL_OPTIONS)}; or {MYSQL_FORM}")
    if options.get("ssl_verify_identity", "true") not in ("true", "false"):
        raise SettingsError("ssl_verify_identity is true or false")
    if "ssl_ca" in options:  # an authority that is named is meant to be checked, and the host's name with it
        options["ssl_verify_identity"] = options.get("ssl_verify_identity", "true") == "true"
        options["ssl_verify_cert"] = True
    return options


# --- Errors ---
# One exception for everything that a client is told. It is Bottle's own response exception, so
# whatever app a route is merged or mounted into sends it as it is; nothing translates it.


JSON_HEADERS = {
    "Content-Type": "application/json",
    "X-Content-Type-Options": "nosniff",  # no browser shall take it for HTML
    "Cache-Control": "no-store",  # it is about one caller, now
}


def error_body(status, error, description):
    return json.dumps({"status_code": status, "error": error, "description": description}) + "\n"


class AuthError(HTTPResponse):
    """A request is refused; str() of it is the description that the client reads."""

    default_status = 401
    error = "Bad Request"

    def __init__(self, description, **headers):
        self.description = description
        body = error_body(self.default_status, self.error, description)
        super().__init__(body, self.default_status, JSON_HEADERS | headers)

    def __str__(self):
        return self.description


class BadRequest(AuthError):
    """The request cannot be understood, or asks for a value that is not allowed."""

    default_status = 400


class PayloadTooLarge(AuthError):
    """The body is longer than any that this service has use for."""

    default_status = 413
    error = "Content Too Large"


class InvalidCredentials(AuthError):
    """User name or password wrong, missing, empty or not a string: always the same words."""

    def __init__(self):
        super().__init__("Invalid credentials")


class AuthorizationRequired(AuthError):
    """A protected route was called without an Authorization header."""

    error = "Authorization Required"


class InvalidHeader(AuthError):
    """The Authorization header is not a scheme that we know and one token."""

    error = "Invalid JWT header"


class InvalidToken(AuthError):
    """The token is not one of ours, or not any more."""

    error = "Invalid token"


class SessionEnded(InvalidToken):
    """The token is good and its session is over: signed out, expired, or ended by another."""

    def __init__(self):
        super().__init__("Session has ended")


class UnknownUser(AuthError):
    """The token is good and its user is gone."""

    error = "Invalid JWT"

    def __init__(self):
        super().__init__("User does not exist")


class Forbidden(AuthError):
    """The caller is known, and may not do this."""

    default_status = 403
    error = "Forbidden"


class NotFound(AuthError):
    """What the request names does not exist."""

    default_status = 404
    error = "Not Found"


class Conflict(AuthError):
    """What the request asks for contradicts what is stored, such as two users of one name."""

    default_status = 409
    error = "Conflict"


class TooManyRequests(AuthError):
    """Too many sign-ins have failed; even the right password is refused for a while."""

    default_status = 429
    error = "Too Many Requests"

    def __init__(self, wait):
        """`wait`: seconds until it may be tried again."""
        seconds = max(1, math.ceil(wait))
        description = f"Too many failed sign-ins; try again in {seconds} s"
        super().__init__(description, **{"Retry-After": str(seconds)})


class Unavailable(AuthError):
    """The database does not answer; the same request may be good in a moment."""

    default_status = 503
    error = "Service Unavailable"

    def __init__(self, description="The database does not answer; try again", retry_after=2):
        super().__init__(description, **{"Retry-After": str(retry_after)})


# --- Passwords ---
# PBKDF2 through hashlib, written as werkzeug writes it, so that the tutorial's table and ours are
# one. Whatever stands in a stored hash, the answer is yes or no, never an exception.


class StoredHash(NamedTuple):
    """A stored hash taken apart. `derive` turns a password's bytes into what `digest` must equal."""

    method: str
    rounds: int  # of PBKDF2; 0 for scrypt
    derive: Callable[[bytes], bytes]
    digest: bytes


def read_pbkdf2(name, rounds, salt, digest):
    derive = partial(hashlib.pbkdf2_hmac, name, salt=salt.encode(), iterations=int(rounds))
    return StoredHash(f"pbkdf2:{name}", int(rounds), derive, digest)


def read_werkzeug_pbkdf2(name, rounds, salt, digest):
    return read_pbkdf2(name, rounds, salt, bytes.fromhex(digest))


def read_django_pbkdf2(name, rounds, salt, digest):
    return read_pbkdf2(name, rounds, salt, base64.b64decode(digest))._replace(method="pbkdf2_sha256")


def read_werkzeug_scrypt(n, r, p, salt, digest):
    if int(n) * int(r) * int(p) > 2**22:  # four times what OWASP asks for; who knows the name may have us compute it
        raise ValueError("too costly")
    costs = {"n": int(n), "r": int(r), "p": int(p), "maxmem": 256 * 2**20}  # bytes; werkzeug's default takes 32 MiB
    return StoredHash(
        f"scrypt:{n}:{r}:{p}", 0, partial(hashlib.scrypt, salt=salt.encode(), **costs), bytes.fromhex(digest)
    )


# The salt is used as its text, not decoded. A digest that is cut short matches no pattern's length
# and no derived digest. The bounds on cost keep one bad row from holding a thread for minutes.
HASH_FORMATS = [
    (r"pbkdf2:(sha1|sha256|sha512):([1-9][0-9]{0,6})\$([^$]+)\$((?:[0-9a-f]{2})+)", read_werkzeug_pbkdf2),
    (r"scrypt:([1-9][0-9]{0,6}):([1-9][0-9]?):([1-9])\$([^$]+)\$([0-9a-f]{128})", read_werkzeug_scrypt),
    (r"pbkdf2_(sha256)\$([1-9][0-9]{0,6})\$([^$]+)\$([A-Za-z0-9+/]{43}=)", read_django_pbkdf2),
]


def read_hash(stored):
    """The StoredHash in a string, or None where there is none that we know."""
    for pattern, read in HASH_FORMATS if isinstance(stored, str) else ():
        if parts := re.fullmatch(pattern, stored):
            with contextlib.suppress(ValueError):  # a salt that is no Unicode, or a cost that is not to be paid
                return read(*parts.groups())
    return None


def hash_password(password, iterations=Settings.pbkdf2_iterations):
    """Return `pbkdf2:sha256:ITERATIONS$SALT$HEX` for a string (RFC 8018, 5.2)."""
    salt = secrets.token_hex(16)
    digest = hashlib.pbkdf2_hmac("sha256", password.encode(), salt.encode(), iterations)
    return f"pbkdf2:sha256:{iterations}${salt}${digest.hex()}"


def verify_password(stored, password, iterations=0):
    """Is this the password of this stored hash? False for a hash that is malformed, unknown, empty or None.

    As much time is spent as `iterations` rounds of PBKDF2-SHA256 take, or more, so that an answer's time does not tell
    an unknown user, a malformed hash or an old cheap one from a wrong password.
    """
    secret = password.encode("utf-8", "surrogatepass")
    hashed = read_hash(stored)
    good = hashed is not None and is_match(hashed, secret)
    rounds = iterations - cost_of(stored)
    if rounds > 0:
        hashlib.pbkdf2_hmac("sha256", secret, b"spent", rounds)
    return good


def cost_of(stored):
    """How many rounds of PBKDF2-SHA256 take as long as verifying this hash does on this machine; 0 where none is."""
    hashed = read_hash(stored)
    if hashed is None:
        return 0
    if hashed.method.startswith("scrypt"):
        return round(seconds_of(hashed.method) / seconds_of("pbkdf2:sha256") * TRIAL_ROUNDS)
    if hashed.method in ("pbkdf2:sha256", "pbkdf2_sha256"):
        return hashed.rounds
    return round(hashed.rounds * seconds_of(hashed.method) / seconds_of("pbkdf2:sha256"))


TRIAL_ROUNDS = 100_000  # about as long as a scrypt hash takes: what is shorter finds a quieter moment


@functools.lru_cache(maxsize=64)
def seconds_of(method):
    """Processor time of a scrypt hash, or of TRIAL_ROUNDS rounds of PBKDF2: the least of three, once per process."""
    if method.startswith("scrypt"):
        derive = read_hash(f"{method}$salt${'0' * 128}").derive
    else:
        derive = partial(hashlib.pbkdf2_hmac, method.partition(":")[2], salt=b"salt", iterations=TRIAL_ROUNDS)
    taken = []
    for _ in range(3):
        start = time.thread_time()
        with contextlib.suppress(ValueError):  # costs that scrypt refuses take no time
            derive(b"password")
        taken.append(time.thread_time() - start)
    return min(taken)


def is_match(hashed, secret):
    try:
        return hmac.compare_digest(hashed.derive(secret), hashed.digest)
    except ValueError:  # costs that scrypt refuses
        return False


def needs_rehash(stored, iterations):
    """Is the hash of another method than hash_password's, or cheaper than `iterations`?"""
    hashed = read_hash(stored)
    return not hashed or hashed.method != "pbkdf2:sha256" or hashed.rounds < iterations


# --- Store ---
# Users and sessions, in SQLite or MySQL, behind one small surface. The tutorial's table is taken as
# it is: no unique index, columns that may be NULL, collations that find ROY for roy. So names are
# compared in Python after the query, and every value is checked before it.

AT_ONCE = 400  # rows read or written by one statement: SQLite takes 999 values, and a packet has its bounds as well
LOCKED = "!"  # before a hash, as `passwd -l` does it: no password matches, and unlocking restores it


@dataclasses.dataclass(frozen=True)
class User:
    id: int
    username: str
    password_hash: str = dataclasses.field(repr=False)

    @property
    def is_locked(self):
        return (self.password_hash or "").startswith(LOCKED)


@dataclasses.dataclass(frozen=True)
class Session:
    """One sign-in on one device, or one named API token. Times are whole seconds since 1970."""

    id: str  # random, 128 bits
    user_id: int
    name: str  # the API token's, or the User-Agent that signed in
    address: str
    created: int
    last_used: int  # to the minute
    expires: int
    generation: int  # of its refresh token, from 1 on; 0 is an API token, which has none
    rotated: int  # when this generation was made
    kid: str  # by which key

    @property
    def is_api_token(self):
        return self.generation == 0


@dataclasses.dataclass(frozen=True)
class Count:
    """Failed sign-ins since a time, the latest of them, and the last good one. Whole seconds since 1970."""

    failures: int = 0
    since: int = 0
    latest: int = 0
    signed_in: int = 0


SESSION = ", ".join(field.name for field in dataclasses.fields(Session))


def again(method):
    """Call a method of Store again, up to ten times, where the failure of its transaction is one that passes.

    The database has undone it because it met another, the connection died, or the host failed and there is another.
    A commit whose answer was lost may have been done all the same, so each method finds out what it did before.
    """

    @functools.wraps(method)
    def wrapper(self, *args, **values):
        for _ in range(9):
            try:
                return method(self, *args, **values)
            except Unavailable as failure:
                if not self._is_passing(failure.__cause__):
                    raise
        return method(self, *args, **values)

    return wrapper


class Store:
    """Users and sessions. Every function raises Unavailable when the database fails.

    A connection serves one thread at a time and none is carried over a fork. What fails in passing is tried again.
    """

    driver = None  # the DB-API module
    begin = ""  # the SQL that starts a transaction
    lock = ""  # the SQL that locks the rows a SELECT finds until the transaction ends
    list_tables = ""
    insert_new = ""  # INSERT that leaves a row that is there already as it is

    def __init__(self, database):
        self.database = database
        self._remembered = None, {}  # (version, what get_session has read since: {session id: (Session, User)})
        self._idle = []  # open connections, the last used on top
        self._failing = {}  # of "read" and "write", what fails: when it did so last
        self._pid = os.getpid()
        self._alone = contextlib.nullcontext()

    @staticmethod
    def open(settings):
        """The store that settings.database names; nothing is connected yet. Raises SettingsError."""
        database = parse_database(settings.database)
        return SQLiteStore(database) if database.kind == "sqlite" else MySQLStore(database, settings)

    def prepare(self):
        """Make missing tables. Raises SettingsError where that fails, with the command that does it by hand."""
        try:
            if self.missing_tables():
                for statement in statements(read_script()):
                    with self.transaction() as run:
                        run(statement)
            self._read("SELECT id, username, password FROM user LIMIT 1")
            self._read(f"SELECT {SESSION} FROM auth_session LIMIT 1")
            self.get_counts("", "")
        except Unavailable as failure:
            raise SettingsError(self.advice(failure.__cause__)) from None

    def close(self):
        """Close the connections that no thread is using."""
        self._leave_parents()
        self._close_idle()

    def missing_tables(self):
        return sorted({"user", "auth_session", "auth_throttle"} - {name for (name,) in self._read(self.list_tables)})

    def ping(self):
        """Run a query."""
        self._read("SELECT 1")

    def version(self, now):
        """Something that is another whenever anybody has committed since; None where that cannot be known."""

    def clock(self):
        """The database's time, in seconds since 1970."""
        return time.time()  # SQLite has no other than ours

    def failing_hosts(self):
        """What is wrong with each host that cannot be used."""
        return []

    def is_private(self):
        """Does nobody else read what goes to and from the database? It is on this host, or behind TLS."""
        return True

    # Users

    def find_user(self, username):
        """The User of exactly this name, or None. Raises Conflict where there are several."""
        try:
            return self._exactly(username, self._read(self._by_name, username))
        except BadRequest:  # the column's character set cannot write this name, so it is nobody's
            return None

    def get_user(self, user_id):
        """The User of this id, or None."""
        rows = self._read("SELECT id, username, password FROM user WHERE id = ?", user_id)
        return User(*rows[0]) if rows else None

    def list_users(self):
        return list(self.each_user())

    def each_user(self):
        """All Users by their ids; read in parts, for there may be many."""
        last = -1
        query = f"SELECT id, username, password FROM user WHERE id > ? ORDER BY id LIMIT {AT_ONCE:d}"
        while rows := self._read(query, last):
            yield from (User(*row) for row in rows)
            last = rows[-1][0]

    @again
    def add_user(self, username, password_hash):
        """Add a user and return the id. Raises Conflict where the name is taken, BadRequest where it does not fit."""
        with self.transaction() as run:
            there = self._exactly(username, run(self._by_name + self.lock, username).fetchall())
            if there and there.password_hash == password_hash:  # salts are random: a first try, whose answer was lost
                return there.id
            if there:
                raise Conflict(f"There is a user {username!r} already")
            return run("INSERT INTO user (username, password) VALUES (?, ?)", username, password_hash).lastrowid

    def add_users(self, users, skip=False, progress=lambda done: None):
        """Add (user name, password hash) pairs, all or none; return how many.

        With `skip` those whose names are taken are left out, else Conflict names the first of them.
        """
        with self.transaction() as run:
            taken = {name for (name,) in run("SELECT username FROM user" + self.lock).fetchall()}
            wanted = []
            for username, password_hash in users:
                if username not in taken:
                    taken.add(username)
                    wanted.append((username, password_hash))
                elif not skip:
                    raise Conflict(f"There is a user {username!r} already, or twice in the file; nothing was imported")
            for first in range(0, len(wanted), AT_ONCE):
                batch = wanted[first : first + AT_ONCE]
                marks = ", ".join(["(?, ?)"] * len(batch))
                run(f"INSERT INTO user (username, password) VALUES {marks}", *(text for pair in batch for text in pair))
                progress(first + len(batch))
        return len(wanted)

    @again
    def replace_hash(self, user, password_hash):
        """Replace a user's hash, unless it was replaced since `user` was read: a newer password is never undone."""
        with self.transaction() as run:
            return self._replace_hash(run, user, password_hash)

    @again
    def set_password(self, user, password_hash, keep=""):
        """Replace a user's hash as replace_hash does, and end the user's sessions save the one whose id is `keep`."""
        with self.transaction() as run:
            replaced = self._replace_hash(run, user, password_hash)
            if replaced:
                self._end_sessions(run, user.id, keep)
            return replaced

    @again
    def remove_user(self, user_id):
        """Delete a user and the user's sessions; True where there was one."""
        with self.transaction() as run:
            removed = run("DELETE FROM user WHERE id = ?", user_id).rowcount == 1
            self._end_sessions(run, user_id)
            return removed

    def _replace_hash(self, run, user, password_hash):
        change = "UPDATE user SET password = ? WHERE id = ? AND COALESCE(password, '') = ?"
        if run(change, password_hash, user.id, user.password_hash or "").rowcount == 1:
            return True
        done = "SELECT id FROM user WHERE id = ? AND password = ?"  # by a first try, whose answer was lost
        return run(done, user.id, password_hash).fetchone() is not None

    _by_name = "SELECT id, username, password FROM user WHERE username = ?"

    @staticmethod
    def _exactly(username, rows):
        users = [User(*row) for row in rows if row[1] == username]
        if len(users) > 1:
            ids = ", ".join(str(user.id) for user in users)
            raise Conflict(f"{len(users)} users are named {username!r} (ids {ids}); rename all but one in the table")
        return users[0] if users else None

    # Sessions

    def add_session(self, session, password_hash):
        """Store a session; False where the user is gone or has another hash by now, such as that of a locked user."""
        return self._add_session(session, "user WHERE id = ? AND password = ?", session.user_id, password_hash)

    def add_api_token(self, session, maker):
        """Store the session of an API token; False where the session that makes it has ended."""
        return self._add_session(session, "auth_session WHERE id = ? AND user_id = ?", maker.id, session.user_id)

    @again
    def _add_session(self, session, witness, *values):
        """Insert where the witness stands: in one statement, for no sign-out may fall between a check and an insert."""
        columns = dataclasses.astuple(session)
        marks = ", ".join("?" * len(columns))
        try:
            with self.transaction() as run:
                insert = f"INSERT INTO auth_session ({SESSION}) SELECT {marks} FROM {witness}"
                return run(insert, *columns, *values).rowcount == 1
        except Conflict:  # ids are random: the row is our own, of a first try whose answer was lost
            return self._read_session(session.id)[0] == session

    def get_session(self, sid, now):
        """(Session, its User), each None where there is none; in one query.

        What was read before serves as long as self.version() says that nothing was committed since. It is asked before
        the read: whatever is committed during it makes the next request read again.
        """
        version = self.version(now)
        if version is None:
            return self._read_session(sid)
        remembered = self._remembered
        if remembered[0] != version:
            remembered = self._remembered = version, {}
        found = remembered[1].get(sid)
        if found is None:
            found = self._read_session(sid)
            if found[0] and len(remembered[1]) < REMEMBERED:
                remembered[1][sid] = found
        return found

    def _read_session(self, sid):
        columns = "s." + SESSION.replace(", ", ", s.") + ", u.id, u.username, u.password"
        rows = self._read_wide(columns, "FROM auth_session s LEFT JOIN user u ON u.id = s.user_id WHERE s.id = ?", sid)
        if not rows:
            return None, None
        *session, user_id, username, password_hash = rows[0]
        return Session(*session), None if user_id is None else User(user_id, username, password_hash)

    def count_alive(self, now):
        """How many sessions there are, all users together."""
        return self._read("SELECT COUNT(*) FROM auth_session WHERE expires > ?", int(now))[0][0]

    def kids_since(self, when):
        """The kids of the keys that signed lately, on whatever host."""
        return [kid for (kid,) in self._read("SELECT DISTINCT kid FROM auth_session WHERE rotated > ?", int(when))]

    def list_sessions(self, user_id, now):
        """The user's Sessions that have not expired, newest first."""
        query = f"SELECT {SESSION} FROM auth_session WHERE user_id = ? AND expires > ? ORDER BY created DESC, id"
        return [Session(*row) for row in self._read(query, user_id, int(now))]

    def count_sessions(self, now):
        """How many sessions each user has: {user id: number}."""
        query = "SELECT user_id, COUNT(*) FROM auth_session WHERE expires > ? GROUP BY user_id"
        return dict(self._read(query, int(now)))

    @again
    def touch_session(self, session, now):
        with self.transaction() as run:
            run("UPDATE auth_session SET last_used = ? WHERE id = ? AND last_used < ?", now, session.id, now)

    @again
    def advance_session(self, session):
        """Store the next generation of a session; False where another request has done it, or the session has ended."""
        with self.transaction() as run:
            change = "UPDATE auth_session SET generation = ?, rotated = ?, kid = ?, last_used = ?, expires = ?"
            values = (session.generation, session.rotated, session.kid, session.last_used, session.expires)
            where = " WHERE id = ? AND generation = ?"
            return run(change + where, *values, session.id, session.generation - 1).rowcount == 1

    @again
    def end_session(self, user_id, sid):
        """Delete one session of a user; True where there was one."""
        with self.transaction() as run:
            return run("DELETE FROM auth_session WHERE id = ? AND user_id = ?", sid, user_id).rowcount == 1

    @again
    def end_sessions(self, user_id, keep=""):
        """Delete a user's sessions save the one whose id is `keep`; return how many."""
        with self.transaction() as run:
            return self._end_sessions(run, user_id, keep)

    def _end_sessions(self, run, user_id, keep=""):
        return run("DELETE FROM auth_session WHERE user_id = ? AND id <> ?", user_id, keep).rowcount

    @again
    def prune_sessions(self, now, most):
        """Delete at most `most` expired sessions."""
        rows = self._read(f"SELECT id FROM auth_session WHERE expires <= ? ORDER BY expires LIMIT {most:d}", int(now))
        if rows:
            marks = ", ".join("?" * len(rows))
            with self.transaction() as run:
                sids = sorted(sid for (sid,) in rows)
                run(f"DELETE FROM auth_session WHERE id IN ({marks}) AND expires <= ?", *sids, int(now))

    # Failed sign-ins

    def get_counts(self, name, address):
        """The Counts of a name from an address, of the address, and of the name, in this order; one query."""
        keys = (name, address), ("", address), (name, "")
        where = " OR ".join(["(name = ? AND address = ?)"] * len(keys))
        query = f"SELECT name, address, failures, since, latest, signed_in FROM auth_throttle WHERE {where}"
        found = {row[:2]: Count(*row[2:]) for row in self._read(query, *(part for key in keys for part in key))}
        return [found.get(key, Count()) for key in keys]

    @again
    def count_failure(self, name, address, now, memories):
        """Add a failure to each of the three; one whose last (or first) is longer ago than its memory starts anew."""
        keys = (name, address), ("", address), (name, "")
        with self.transaction() as run:
            for key, (column, seconds) in zip(keys, memories, strict=True):
                over = f"{column} + {seconds:d} <= {now:d}"
                change = (
                    f"UPDATE auth_throttle SET failures = CASE WHEN {over} THEN 1 ELSE failures + 1 END, "
                    f"since = CASE WHEN {over} THEN ? ELSE since END, latest = ?, "
                    "expires = CASE WHEN expires < ? THEN ? ELSE expires END WHERE name = ? AND address = ?"
                )
                values = (now, now, now + seconds, now + seconds, *key)
                if not run(change, *values).rowcount:  # only then inserted: an insert's locks are worse for others
                    new = *key, now, now, now + seconds
                    run(f"{self.insert_new} INTO auth_throttle VALUES (?, ?, 0, ?, ?, 0, ?)", *new)
                    run(change, *values)

    @again
    def count_sign_in(self, name, address, now, memory):
        """Note a good sign-in, which forgets the failures of this name from this address."""
        with self.transaction() as run:
            run(f"{self.insert_new} INTO auth_throttle VALUES (?, ?, 0, ?, ?, 0, ?)", name, address, now, now, now)
            change = "UPDATE auth_throttle SET failures = 0, signed_in = ?, expires = ? WHERE name = ? AND address = ?"
            run(change, now, now + memory, name, address)

    @again
    def forget_failures(self, name):
        """Forget the failures of a name, from everywhere."""
        with self.transaction() as run:
            run("UPDATE auth_throttle SET failures = 0 WHERE name = ?", name)

    @again
    def note_forwarder(self, address, now):
        """Keep for a day that X-Forwarded-For came from an address that is no trusted proxy."""
        with self.transaction() as run:
            row = "x-forwarded-for", address, now, now, now + DAY
            run(f"{self.insert_new} INTO auth_throttle VALUES (?, ?, 0, ?, ?, 0, ?)", *row)

    def get_forwarders(self, now):
        """The addresses of note_forwarder."""
        query = "SELECT address FROM auth_throttle WHERE name = 'x-forwarded-for' AND expires > ?"
        return [address for (address,) in self._read(query, int(now))]

    @again
    def prune_counts(self, now, most):
        """Delete at most `most` expired counts."""
        query = f"SELECT name, address FROM auth_throttle WHERE expires <= ? ORDER BY expires LIMIT {most:d}"
        if rows := self._read(query, int(now)):
            with self.transaction() as run:
                for row in sorted(rows):
                    run("DELETE FROM auth_throttle WHERE name = ? AND address = ? AND expires <= ?", *row, int(now))

    # Connections

    @contextlib.contextmanager
    def transaction(self):
        """`with store.transaction() as run: run(sql, *values)`: commit, or roll back and re-raise."""
        with self._refusals("write"), self._alone:
            connection, _ = self._first(self.begin)
            try:
                yield partial(self._run, connection)
                connection.commit()
            except BaseException as error:
                self._roll_back(connection, error)
                raise
            self._idle.append(connection)

    @again
    def _read(self, sql, *values):
        with self._refusals("read"), self._alone:
            connection, cursor = self._first(sql, *values)
            rows = cursor.fetchall()
            self._idle.append(connection)
            return rows

    def _read_wide(self, columns, rest, *values):
        return self._read(f"SELECT {columns} {rest}", *values)

    def _first(self, sql, *values):
        """Run a first statement on an idle connection, or on a new one where the idle one is dead."""
        while True:
            connection, is_new = self._take()
            try:
                return connection, self._run(connection, sql, *values)
            except BaseException as error:
                self._drop(connection, error)
                if is_new or not self._is_dead(error):
                    raise
                self._close_idle()  # what killed one has most likely killed all
                count("database_reconnects_total")

    def _close_idle(self):
        while self._idle:
            with contextlib.suppress(IndexError):  # another thread was quicker
                self._idle.pop().close()

    def _leave_parents(self):
        """After a fork, leave the parent's connections as they are, open and unused, or the parent would lose them."""
        if self._pid != os.getpid():
            self._parents, self._idle, self._pid = self._idle, [], os.getpid()
            self._remembered = None, {}

    def _take(self):
        self._leave_parents()
        try:
            return self._idle.pop(), False
        except IndexError:
            return self._connect(), True

    def _roll_back(self, connection, error):
        try:
            connection.rollback()
        except self.driver.Error:
            self._drop(connection, error)
        else:
            self._idle.append(connection)
            self._learn(connection, error)

    def _drop(self, connection, error):
        connection.close()
        self._learn(connection, error)

    @contextlib.contextmanager
    def _refusals(self, what):
        """Turn the driver's exceptions into ours. A line in the log for each change, not for each request."""
        try:
            yield
        except self.driver.IntegrityError as error:
            raise Conflict("The table takes that name for the name of another user") from error
        except self.driver.Error as error:
            if self._is_misfit(error):
                raise BadRequest("The table's columns are too short, or cannot write these characters") from error
            if not self._is_passing(error):
                count("database_errors_total")
                if what not in self._failing:
                    event("database_error", logging.ERROR, what=what, error=str(error))
                self._failing[what] = time.monotonic()
            raise Unavailable() from error
        if what in self._failing and time.monotonic() - self._failing.get(what, 0) > 1 and self._failing.pop(what, 0):
            event("database_back", what=what)

    def _learn(self, connection, error):
        """What a failure tells of a connection's host or file."""

    def _is_dead(self, error):
        """Did the connection end before the statement did anything?"""
        return False

    def _is_passing(self, error):
        """Is the same worth another try at once?"""
        return False

    def _is_misfit(self, error):
        return isinstance(error, self.driver.DataError)


SCRIPT = Path(__file__).with_name("schema.sql")


def read_script():
    try:
        return SCRIPT.read_text("utf-8")
    except OSError as error:
        raise SettingsError(f"{SCRIPT}: {error.strerror}; schema.sql belongs beside server.py") from None


def statements(script):
    """Split SQL text. SQLite's own scanner knows comments and strings, which a split at `;` does not."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


class SQLiteStore(Store):
    driver = sqlite3
    begin = "BEGIN IMMEDIATE"
    list_tables = "SELECT name FROM sqlite_master"
    insert_new = "INSERT OR IGNORE"

    def __init__(self, database):
        super().__init__(database)
        self._wal_index = self._watch = None
        self._numbers = itertools.count()  # of the indexes that were mapped: a new one begins with the same header
        self._path = os.path.realpath(database.name)  # a later chdir leads nowhere else
        self._address = Path(self._path).as_uri()
        if not database.name:  # in memory: a database of this name, alive while one connection is, for one at a time
            self._address = f"file:{secrets.token_hex(8)}?mode=memory&cache=shared"
            self._anchor, self._alone = self._connect(), threading.RLock()

    def close(self):
        super().close()
        if not self.database.name:
            self._anchor.close()

    def _close_idle(self):
        super()._close_idle()
        watch, self._wal_index, self._watch = self._watch, None, None
        if watch:
            watch.close()

    def version(self, now):
        """The WAL-index header, which each commit by anybody on this host changes (sqlite.org/walformat.html, 2.1).

        To look at it costs a thousandth of a SELECT in a process of many threads, which fight for the interpreter.
        """
        self._leave_parents()
        index = self._wal_index
        if index is None:
            index = self._wal_index = next(self._numbers), self._map_wal_index()
        number, header = index[0], index[1][:48]
        return (number, header) if header else None

    def _map_wal_index(self):
        """The file's bytes as they are at each look; b"" where there are none: in memory, or without WAL mode.

        The connection that comes with it keeps the file: SQLite removes it when the last one closes.
        """
        try:
            self._watch = self._connect()
            self._watch.execute("SELECT name FROM sqlite_master").fetchall()
            return map_for_ever(f"{self._path}-shm")
        except (OSError, ValueError, sqlite3.Error):
            return b""

    def _leave_parents(self):
        if self._pid != os.getpid():
            self._parents_watch, self._watch, self._wal_index = self._watch, None, None
        super()._leave_parents()

    def _connect(self):
        if self.database.name:  # hashes are for the owner's eyes; SQLite gives its other files the same mode
            with contextlib.suppress(OSError):
                os.close(os.open(self._path, os.O_CREAT | os.O_EXCL, 0o600))
        connection = sqlite3.connect(self._address, uri=True, timeout=5, isolation_level=None, check_same_thread=False)
        try:
            connection.text_factory = partial(str, encoding="utf-8", errors="replace")  # a damaged row is no exception
            write_ahead(connection)
            connection.execute("PRAGMA synchronous = FULL")  # in WAL mode what survives a power cut
        except BaseException:
            connection.close()
            raise
        return connection

    def _learn(self, connection, error):
        if "readonly" in str(error):  # a file that is writable again is so once all have closed it
            self._close_idle()
        if "full" in str(error):  # the log may be all that fills the disk
            with contextlib.suppress(sqlite3.Error):
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _run(self, connection, sql, *values):
        # AUTOINCREMENT, which MySQL spells otherwise: a token of a removed user must not fit the next one
        return connection.execute(sql.replace("/*! AUTO_INCREMENT */", "AUTOINCREMENT"), values)

    def advice(self, error):
        return f"{self.database}: {error}; file and folder must be writable, with room on the disk; or name another"


MAPPED, MAPPING = {}, threading.Lock()  # {(device, inode): (descriptor, map)}


def map_for_ever(path):
    """Map the first 48 bytes of a file that SQLite has open, too, and never let go of it.

    When a process closes any descriptor of a file it loses all its locks on it (POSIX), SQLite's among them: the next
    process to come would take the index for abandoned, and cut it off under our feet.
    """
    status = os.stat(path)
    key = status.st_dev, status.st_ino
    with MAPPING:
        for old, (descriptor, _) in [*MAPPED.items()]:
            if not os.fstat(descriptor).st_nlink:  # SQLite has removed it, so nobody has locks on it
                os.close(MAPPED.pop(old)[0])
        if key not in MAPPED:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            MAPPED[key] = descriptor, mmap.mmap(descriptor, 48, access=mmap.ACCESS_READ)
        return MAPPED[key][1]


def write_ahead(connection, tries=100):
    """Turn WAL mode on. SQLite does not wait where several do this to a new file at once, so we do."""
    for _ in range(tries):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error):
                raise
            failure = error
            time.sleep(0.05)
    raise failure


LOST = {2006, 2013, 1053, 1317, 1927, 4031}  # the connection ended: KILL, wait_timeout, a server that was restarted
GONE = {2003, 1047}  # the host does not answer, or is a node of a cluster that has lost the others
REFUSING = {1290, 1836}  # it is read-only
WAITED = 1205  # for a lock, or a node of a cluster for the others
LOOK_AGAIN = 1  # seconds between two looks for a host that has failed


def number_of(error):
    return error.args[0] if error.args else None


def is_timeout(error):
    return isinstance(error.__context__, TimeoutError)


def host_of(connection):
    return connection.host, connection.port


def place_of(host):
    return f"{host[0]}:{host[1]}"


class MySQLStore(Store):
    """MySQL or MariaDB through PyMySQL. Error numbers are the servers' own."""

    driver = pymysql
    begin = "START TRANSACTION"
    lock = " FOR UPDATE"
    list_tables = "SELECT table_name FROM information_schema.tables WHERE table_schema = DATABASE()"
    insert_new = "INSERT IGNORE"

    def __init__(self, database, settings):
        super().__init__(database)
        self._session_cache, self._writes = settings.session_cache, 0
        self._timeouts = {"connect_timeout": settings.connect_timeout}
        self._timeouts |= {"read_timeout": settings.read_timeout, "write_timeout": settings.read_timeout}
        self._down, self._marking = {}, threading.Lock()  # {(host, port) that has failed: its error}
        self._nodes = weakref.WeakSet()  # connections to nodes of a Galera cluster
        self._closing = threading.Event()

    def close(self):
        super().close()
        self._closing.set()
        self._down, self._closing = {}, threading.Event()

    def version(self, now):
        """Nobody tells of others' commits; session_cache is how long they may stay unseen. Our own are seen at once."""
        return (self._writes, now // self._session_cache) if self._session_cache else None

    @contextlib.contextmanager
    def transaction(self):
        try:
            with super().transaction() as run:
                yield run
        finally:  # after the commit, and before the answer
            self._writes += 1

    def _leave_parents(self):
        if self._pid != os.getpid():
            self._down, self._closing = {}, threading.Event()
        super()._leave_parents()

    def _take(self):
        """A connection to the first host that is up: as soon as that is another, connections move over."""
        self._leave_parents()
        best = self._best_host()
        while self._idle:
            with contextlib.suppress(IndexError):  # another thread was quicker
                connection = self._idle.pop()
                if host_of(connection) == best:
                    return connection, False
                connection.close()
        return self._connect(), True

    def _best_host(self):
        return next((host for host in self.database.hosts if host not in self._down), None)

    def _connect(self):
        failure = None
        for host in self.database.hosts:
            if host in self._down:
                failure = failure or pymysql.OperationalError(*self._down[host].args)
                continue
            try:
                return self._connect_to(*host)
            except (RuntimeError, OSError) as error:  # `cryptography` or a certificate's file is missing
                raise pymysql.OperationalError(0, str(error)) from None
            except pymysql.Error as error:
                failure = error
                self._judge(host, error, is_doubtful=True)
        raise failure

    def _connect_to(self, host, port):
        connection = pymysql.connect(
            host=host,
            port=port,
            user=self.database.user,
            password=self.database.password.encode(),
            database=self.database.name,
            charset="utf8mb4",
            autocommit=True,  # else a read would see the world as of this connection's first read
            init_command="SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ",  # else INSERT … SELECT locks no row
            **self._timeouts,
            **self.database.options,
        )
        try:
            self._set_up(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _set_up(self, connection):
        # Strict, or a value that is too long is cut without a word. Whoever waits for a lock gives up before we think
        # that the host is gone.
        patience = max(1, self._timeouts["read_timeout"] // 2)
        self._run(connection, f"SET sql_mode = 'STRICT_ALL_TABLES', innodb_lock_wait_timeout = {patience}")
        if self._run(connection, "SHOW VARIABLES LIKE 'wsrep_on'").fetchall() == (("wsrep_on", "ON"),):
            self._run(connection, "SET wsrep_sync_wait = 7")  # for what the other Galera nodes have acknowledged before
            self._nodes.add(connection)

    def _learn(self, connection, error):
        is_doubtful = number_of(error) in REFUSING or (number_of(error) == WAITED and connection in self._nodes)
        self._judge(host_of(connection), error, is_doubtful)

    def _judge(self, host, error, is_doubtful):
        """Leave a host alone that has failed; where it may be up for others, only if there is another."""
        others = any(other not in self._down for other in self.database.hosts if other != host)
        if number_of(error) in GONE or is_timeout(error) or (others and is_doubtful):
            self._leave_host(host, error)

    def _leave_host(self, host, error):
        """Leave a host alone until it answers again. A thread looks for that, so that no request waits for it."""
        error.host = host
        with self._marking:
            if host in self._down:
                return
            self._down[host] = error
        event("database_host_failed", logging.WARNING, host=place_of(host), error=str(error))
        arguments = host, self._down, self._closing
        threading.Thread(target=self._watch_host, args=arguments, daemon=True).start()

    def _is_read_only(self, host):
        """Ask a host, over a connection of its own. Raises pymysql.Error, RuntimeError or OSError where it fails."""
        with contextlib.closing(self._connect_to(*host)) as connection:
            [[read_only]] = self._run(connection, "SELECT @@read_only").fetchall()
        return str(read_only) not in ("0", "OFF")  # newer servers have words for it

    def _watch_host(self, host, down, closing):
        while not closing.wait(LOOK_AGAIN):
            with contextlib.suppress(pymysql.Error, RuntimeError, OSError):
                if not self._is_read_only(host) or self._best_host() is None:
                    event("database_host_back", host=place_of(host))
                    del down[host]
                    return

    def _run(self, connection, sql, *values):
        cursor = connection.cursor()
        cursor.execute(sql.replace("?", "%s"), values)
        return cursor

    def _read_wide(self, columns, rest, *values):
        """One JSON array in place of many columns: PyMySQL takes 10 µs over the description of each."""
        return [json.loads(row) for (row,) in self._read(f"SELECT JSON_ARRAY({columns}) AS j {rest}", *values)]

    def clock(self):
        return float(self._read("SELECT UNIX_TIMESTAMP(NOW(3))")[0][0])

    def failing_hosts(self):
        for host in self.database.hosts:
            try:
                if self._is_read_only(host):
                    yield f"{place_of(host)} is read-only"
            except (pymysql.Error, RuntimeError, OSError) as error:
                yield f"{place_of(host)}: {error.args[-1]}"

    def is_private(self):
        if "unix_socket" in self.database.options or all(is_loopback(host) for host, _ in self.database.hosts):
            return True
        return bool(self._read("SHOW SESSION STATUS LIKE 'Ssl_cipher'")[0][1])

    def _is_dead(self, error):
        return number_of(error) in LOST and not is_timeout(error) or isinstance(error, pymysql.InterfaceError)

    def _is_passing(self, error):
        moved = getattr(error, "host", None) in self._down and self._best_host() is not None
        return moved or self._is_dead(error) or number_of(error) == 1213

    def _is_misfit(self, error):
        incomparable = error.args[:1] in ((1267,), (3988,))  # a latin1 column and a name in another alphabet
        return incomparable or super()._is_misfit(error)

    def advice(self, error):
        if error.args[:1] == (1142,):  # may not CREATE
            name, user = self.database.name, self.database.user
            return f"{user} may not make tables; run as one who may: mariadb {name} < {SCRIPT}"
        return f"{self.database}: {error.args[-1]}; AUTH_DATABASE names the server, the database and the account"


# --- Tokens ---
# The key set signs and verifies; a token's own header chooses nothing but which of our keys to
# try. Time is an argument everywhere, in seconds since 1970.

MIN_RSA_BITS = 3072
THUMBPRINT_MEMBERS = {  # RFC 7638, 3.2 and RFC 8037, 2: what identifies a public key, and for oct the secret itself
    "oct": ("k", "kty"),
    "OKP": ("crv", "kty", "x"),
    "EC": ("crv", "kty", "x", "y"),
    "RSA": ("e", "kty", "n"),
}
ALGORITHMS = ("HS256", "EdDSA", "ES256", "RS256")


@dataclasses.dataclass(frozen=True)
class Key:
    kid: str  # the thumbprint (RFC 7638)
    algorithm: str
    signer: jwt.PyJWK = dataclasses.field(repr=False)
    verifier: jwt.PyJWK = dataclasses.field(repr=False)
    public: dict | None  # as a JWK; a symmetric key has none
    secret: bytes = dataclasses.field(repr=False)  # what only the key's owner has, for the MAC of refresh tokens

    @classmethod
    def from_jwk(cls, jwk):
        """Read one private key of a JWK Set (RFC 7517). Raises SettingsError, which never repeats what it read."""
        try:
            members = {name: jwk[name] for name in THUMBPRINT_MEMBERS[jwk["kty"]]}
            private = jwk["k" if jwk["kty"] == "oct" else "d"]
            signer = jwt.PyJWK.from_dict(jwk)
            verifier = jwt.PyJWK.from_dict(members, signer.algorithm_name)
            signer.Algorithm.sign(b"", signer.Algorithm.prepare_key(signer.key))
        except Exception:  # PyJWT has many words for it, and some of them repeat the key
            raise SettingsError("a key is not a private JSON Web Key (RFC 7517)") from None
        kid, algorithm = thumbprint(members), signer.algorithm_name
        if algorithm not in ALGORITHMS:
            raise SettingsError(f"a key is for {algorithm}, which is none of {', '.join(ALGORITHMS)}")
        public = None if jwk["kty"] == "oct" else {"kid": kid, "use": "sig", "alg": algorithm, **members}
        return cls(kid, algorithm, signer, verifier, public, private.encode())

    @classmethod
    def from_secret(cls, secret):
        return cls.from_jwk({"kty": "oct", "alg": "HS256", "k": base64url(secret.encode("utf-8", "surrogateescape"))})

    def mac(self, message):
        """A MAC for what this service reads itself; the label keeps it apart from what else the key signs."""
        return base64url(hmac.digest(self.secret, b"rest-auth\n" + message.encode(), "sha256"))


def base64url(data):
    """RFC 7515, 2: base64url without padding."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def thumbprint(members):
    """RFC 7638, 3: the SHA-256 of the key's required members, sorted, without white space."""
    text = json.dumps(members, sort_keys=True, separators=(",", ":"))
    return base64url(hashlib.sha256(text.encode()).digest())


TOKEN_MEMORY = 'token_memory_total{found="no"}', 'token_memory_total{found="yes"}'
SESSION_ID = re.compile(r"[A-Za-z0-9_-]{22}")
REFRESH_TOKEN = re.compile(r"([A-Za-z0-9_-]{22})\.([1-9][0-9]{0,15})\.([A-Za-z0-9_-]{43})")


class KeySet:
    """Keys, newest first: the first one signs, all verify.

    Those of a file are read again when it changes, which is looked for once a second and when a token names a key that
    is not among them. A file that is broken by then leaves the keys as they are, and the log says so.
    """

    def __init__(self, keys=(), path=""):
        self._beside = tuple(keys)  # verify beside the file's, and sign where there is no file
        self._path, self._stamp, self._looked, self._failure = path, None, 0.0, None
        self._reading = threading.Lock()  # or who reads an older file might have the last word
        self.keys, self._verified = self._beside, {}  # claims by token, of these keys

    @classmethod
    def load(cls, settings, create=False):
        """The keys of the key file, then the secret; `create` makes a file where there is neither."""
        secret = [Key.from_secret(settings.secret_key)] if settings.secret_key else []
        there = os.path.lexists(settings.keys)
        if create and not there and not secret:
            create_key_file(settings.keys)
        key_set = cls(secret, settings.keys)
        if there or not secret:
            key_set._read()
        return key_set

    def public(self, now):
        """The JWK Set of the public keys (RFC 7517, 5)."""
        self._look(now)
        return {"keys": [key.public for key in self.keys if key.public]}

    def signing_kid(self, now):
        """The kid of the key that signs at `now`."""
        self._look(now)
        return self.keys[0].kid

    def sign(self, claims):
        """Sign a dict of claims and return the token (RFC 7519)."""
        self._look(claims["iat"])
        key = self.keys[0]
        return jwt.encode(claims, key.signer, headers={"kid": key.kid}, sort_headers=False)

    def verify(self, token, now, leeway=0):
        """Return the claims of a token that is good at `now`. Raises InvalidToken, with PyJWT's text.

        A token that has verified once needs no second look at its signature as long as the keys stay: only the times
        change. What does not verify is not remembered, so nobody fills the memory with junk.
        """
        self._look(now)
        verified = self._verified  # before the keys are used: those of a changed file come with a new one
        claims = verified.get(token)
        count(TOKEN_MEMORY[claims is not None])
        if claims is None:
            try:
                claims = self._decode(token)
            except jwt.PyJWTError as error:
                raise InvalidToken(words_of(error)) from None
            check_types(claims)
            if len(verified) >= REMEMBERED:
                verified.clear()
            verified[token] = claims
        check_times(claims, now, leeway)
        return claims

    def refresh_token(self, session):
        """The refresh token of a session's generation: the same each time, and more than the database can tell."""
        if all(key.kid != session.kid for key in self.keys):
            self._read_if_changed()
        key = next((key for key in self.keys if key.kid == session.kid), self.keys[0])
        message = f"{session.id}.{session.generation}"
        return f"{message}.{key.mac(message)}"

    def read_refresh_token(self, token, now):
        """(session id, generation) of a refresh token that one of the keys has made. Raises InvalidToken."""
        self._look(now)
        parts = REFRESH_TOKEN.fullmatch(token)
        message = token.rpartition(".")[0]
        for look in (lambda: None, self._read_if_changed):
            look()
            if parts and any(hmac.compare_digest(parts[3], key.mac(message)) for key in self.keys):
                return parts[1], int(parts[2])
        raise InvalidToken("The refresh token is not one of this service")

    def digest(self, text, now):
        """What stands for a text in the database, as long as the oldest key stays."""
        self._look(now)
        return self.keys[-1].mac(f"digest of {text}")[:22]

    def _decode(self, token):
        kid = jwt.get_unverified_header(token).get("kid")
        if kid is not None and all(kid != key.kid for key in self.keys):
            self._read_if_changed()
        failure = jwt.InvalidSignatureError("Signature verification failed")
        for key in self.keys:
            if kid not in (None, key.kid):
                continue
            try:
                return jwt.decode(token, key.verifier, options=DECODE_OPTIONS)
            except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError) as error:
                failure = error
        raise failure

    def _look(self, now):
        if not -1 < now - self._looked < 1:
            self._looked = now
            self._read_if_changed()

    def _read_if_changed(self):
        with self._reading:
            stamp = file_stamp(self._path)
            if not self._path or stamp == self._stamp:
                return
            try:
                self._read()
            except (
                SettingsError
            ) as error:  # tried again at the next look: what is missing may be a mode, or a descriptor
                if self._failure != (stamp, str(error)):
                    self._failure = stamp, str(error)
                    event("key_file_refused", logging.ERROR, error=f"{error}; the keys stay as they are")
            else:
                event("key_rotated", signs=self.keys[0].kid, verify=[key.kid for key in self.keys])

    def _read(self):
        stamp = file_stamp(self._path)
        keys = read_key_file(self._path)
        kids = {key.kid for key in keys}
        self.keys = (*keys, *(key for key in self._beside if key.kid not in kids))
        self._verified = {}
        self._stamp, self._failure = stamp, None


def file_stamp(path):
    """What changes whenever the file does; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode


NO_PUBLIC_KEYS = "The issuer's public keys are not to be had; try again"


class RemoteKeySet:
    """The public keys that another host publishes (RFC 7517): verifies, and cannot sign."""

    def __init__(self, url, timeout=5):
        """`timeout`: seconds for a fetch. Raises SettingsError."""
        try:
            self._client = jwt.PyJWKClient(url, lifespan=300, timeout=timeout, cooldown_duration=5)  # seconds
        except (jwt.PyJWKClientError, ValueError) as error:
            raise SettingsError(f"jwks_url: {error}") from None
        self._lock, self._retry_at = threading.Lock(), 0.0

    def verify(self, token, now, leeway=0):
        """As KeySet.verify. Raises Unavailable where the keys cannot be fetched."""
        try:
            key = self._key(jwt.get_unverified_header(token).get("kid"))
            claims = jwt.decode(token, key, options=DECODE_OPTIONS)
        except jwt.PyJWTError as error:
            raise InvalidToken(words_of(error)) from None
        check_types(claims)
        check_times(claims, now, leeway)
        return claims

    def _key(self, kid):
        key = self._known(kid) or self._fetched(kid)
        if key.algorithm_name not in ALGORITHMS[1:]:  # a symmetric key that is published is nobody's
            raise InvalidToken("The key of this token is not a public one")
        return key

    def _known(self, kid):
        return next((key for key in self._client.jwk_set_cache.get() or () if key.key_id == kid), None)

    def _fetched(self, kid):
        """The key after a fetch: one at a time, and none for two seconds after one that failed."""
        if not self._lock.acquire(timeout=self._client.timeout):
            raise Unavailable(NO_PUBLIC_KEYS)
        try:
            if time.monotonic() < self._retry_at:
                raise Unavailable(NO_PUBLIC_KEYS)
            return self._client.get_signing_key(kid)
        except AuthError:
            raise
        except Exception as error:  # what a host that is not ours answers has no bounds
            if self._client.jwk_set_cache.get() and not isinstance(error, jwt.PyJWKClientConnectionError):
                raise InvalidToken("The key of this token is not published") from None
            event("jwks_error", logging.ERROR, error=str(error))
            self._retry_at = time.monotonic() + 2
            raise Unavailable(NO_PUBLIC_KEYS) from None
        finally:
            self._lock.release()


def words_of(error):
    """PyJWT's text without what comes after a colon: there it quotes the token, or Python."""
    return str(error).partition(": ")[0]


# PyJWT checks times against the clock of the machine; check_times does it against `now`.
DECODE_OPTIONS = {
    "require": ["exp", "iat", "nbf", "identity"],
    "verify_exp": False,
    "verify_iat": False,
    "verify_nbf": False,
}


def check_types(claims):
    """Raise InvalidToken unless the claims are typed as ours are."""
    for name in ("exp", "iat", "nbf"):
        if type(claims[name]) not in (int, float) or not 0 <= claims[name] < 2**53:  # NaN is not between them either
            raise InvalidToken(f"The claim {name} must be a number of seconds")
    identity = claims["identity"]
    if type(identity) is not int or not 0 < identity < 2**63:
        raise InvalidToken("The claim identity must be the integer id of a user")
    if claims.get("sub", str(identity)) != str(identity):
        raise InvalidToken("The claims identity and sub name different users")
    if "sid" in claims and not (isinstance(claims["sid"], str) and SESSION_ID.fullmatch(claims["sid"])):
        raise InvalidToken("The claim sid must be the id of a session")


def check_times(claims, now, leeway):
    """Raise InvalidToken unless the claims are good at `now` (RFC 7519, 4.1.4 to 4.1.6)."""
    if claims["exp"] <= now - leeway:
        raise InvalidToken("Signature has expired")
    for name in ("iat", "nbf"):
        if claims[name] > now + leeway:
            raise InvalidToken(f"The token is not yet valid ({name})")


def read_key_file(path):
    """The Keys of a private JWK Set. Raises SettingsError for a file that is open to others or malformed."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), encoding="utf-8") as file:  # a FIFO would wait for ever
            mode = os.fstat(file.fileno()).st_mode & 0o777
            jwks = json.load(file)["keys"]
    except OSError as error:
        raise SettingsError(f"key file {path}: {error.strerror}; the service makes it at its first start") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SettingsError(f'key file {path}: not a JWK Set, {{"keys": […]}}; name another, or restore it') from None
    if mode & 0o027:
        raise SettingsError(f"key file {path}: open to others (mode {mode:04o}); run: chmod 600 {path}")
    if not isinstance(jwks, list) or not jwks:
        raise SettingsError(f"key file {path}: holds no keys; name another, or restore it")
    try:
        keys = [Key.from_jwk(jwk) for jwk in jwks]
        check_keys(keys)
    except SettingsError as error:
        raise SettingsError(f"key file {path}: {error}") from None
    return keys


def check_keys(keys):
    """Raise SettingsError for a key that is too short or there twice."""
    for key in keys:
        problem = key.signer.Algorithm.check_key_length(key.signer.key)
        if key.algorithm == "RS256" and key.signer.key.key_size < MIN_RSA_BITS:
            problem = f"an RSA key has {key.signer.key.key_size} bits; it needs {MIN_RSA_BITS}"
        if problem:
            raise SettingsError(problem)
        if key.algorithm == "HS256":
            check_secret(key.signer.key)
    kids = [key.kid for key in keys]
    if len(set(kids)) < len(kids):
        raise SettingsError("a key is there twice; delete one of the two")


def new_jwk(algorithm):
    """A new private key for one of ALGORITHMS, as a JWK."""
    if algorithm == "HS256":
        jwk = {"kty": "oct", "k": secrets.token_urlsafe(32)}
    else:
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

        make = {
            "EdDSA": ed25519.Ed25519PrivateKey.generate,
            "ES256": partial(ec.generate_private_key, ec.SECP256R1()),
            "RS256": partial(rsa.generate_private_key, 65537, MIN_RSA_BITS),
        }
        jwk = jwt.get_algorithm_by_name(algorithm).to_jwk(make[algorithm](), as_dict=True)
        jwk.pop("key_ops", None)
    return {"kid": Key.from_jwk(jwk).kid, "alg": algorithm, **jwk}


def create_key_file(path):
    """Write a new key, unless somebody else has just done it."""
    path = os.path.realpath(path)
    with locked_folder(path):
        if not os.path.lexists(path):
            replace_key_file(path, [new_jwk("HS256")])


def rotate_key_file(path, algorithm=None, signs=True):
    """Put a new key first, or second where it shall only verify as yet; for the first one's algorithm unless told.

    Returns the new Key. Raises SettingsError.
    """
    with key_file_to_change(path) as jwks:
        first = Key.from_jwk(jwks[0]).algorithm if jwks else "HS256"
        jwk = new_jwk(algorithm or first)
        jwks.insert(0 if signs else 1, jwk)
        return Key.from_jwk(jwk)


def promote_key(path, kid):
    """Put a key that is in the file first. Raises SettingsError."""
    with key_file_to_change(path) as jwks:
        found = jwk_of(kid, jwks, path)
        jwks.remove(found)
        jwks.insert(0, found)
        return Key.from_jwk(found)


def retire_key(path, kid):
    """Take a key out of the file and return the one that signs then. Raises SettingsError for one that cannot go."""
    with key_file_to_change(path) as jwks:
        jwks.remove(jwk_of(kid, jwks, path))
        if not jwks:
            raise SettingsError(f"key file {path}: {kid} is the last key; rotate first, then retire it")
        return Key.from_jwk(jwks[0])


def jwk_of(kid, jwks, path):
    """The JWK of this kid. Raises SettingsError."""
    for jwk in jwks:
        if Key.from_jwk(jwk).kid == kid:
            return jwk
    raise SettingsError(f"key file {path}: there is no key {kid!r}; `key list` shows which there are")


@contextlib.contextmanager
def key_file_to_change(path):
    """The JWKs of a key file as a list to change, by one process at a time."""
    path = os.path.realpath(path)
    with locked_folder(path):
        jwks = []
        if os.path.lexists(path):
            read_key_file(path)
            jwks = json.loads(Path(path).read_text("utf-8"))["keys"]
        yield jwks
        replace_key_file(path, jwks)


@contextlib.contextmanager
def locked_folder(path):
    """Keep other processes that come through here out of the folder, until the end of the block or of this process."""
    try:
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
    except OSError as error:
        raise SettingsError(f"key file {path}: cannot be written: {error.strerror}; name another with --keys") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def replace_key_file(path, jwks):
    """Write a key file in a locked folder, at once or not at all, whatever is cut off; mode and owner stay."""
    draft = f"{path}.draft"  # one that a kill has left behind is overwritten by the next
    try:
        status = os.stat(path) if os.path.exists(path) else None
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(json.dumps({"keys": jwks}, indent=1) + "\n")
            file.flush()
            if status:  # root may rotate for the service, which has to read it; another who cannot is refused here
                os.fchown(file.fileno(), status.st_uid, status.st_gid)
                os.fchmod(file.fileno(), status.st_mode & 0o777)
            os.fsync(file.fileno())
        os.replace(draft, path)
        folder = os.open(os.path.dirname(path), os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        raise SettingsError(f"key file {path}: cannot be written: {error.strerror}; name another with --keys") from None


# --- Sign-in ---
# The rules, without HTTP: who gets a token, and whom a token stands for.


# Seconds in which the previous refresh token, sent again, is a client that lost the answer; more than read_timeout and
# Retry-After together, after which comes back who was told 503 for a commit that was done all the same.
RETRY_WINDOW = 10
TOUCH_AFTER = 60  # seconds between two notes of a session's last use, for each is a write
PRUNE_AT_ONCE = 10  # expired sessions deleted in passing; each sign-in adds one, so they cannot pile up
TOKEN_TTL, TOKEN_MAX = 90 * DAY, 366 * DAY  # seconds that an API token lives unless told, and at the most

# Failed sign-ins are counted three ways, each until a memory of so many seconds is over: by name and address since the
# latest of them, by address and by name since the first.
MEMORIES = (("latest", 3600), ("since", 600), ("since", 3600))
LONGEST_WAIT = 900  # seconds between two tries of one name from one address
AT_HOME = 30 * DAY  # seconds in which an address that a user signed in from is not shut by failures elsewhere


def waits(counts, limits, now):
    """Seconds to wait for each of the three Counts of Store.get_counts, given the limits; 0 or less is none."""
    pair, by_address, by_name = counts
    past = pair.failures - limits[0]
    longest = min(2 ** min(past, 10), LONGEST_WAIT)  # and no longer by a clock that was set back
    yield min(pair.latest + longest - now, longest) if limits[0] and past >= 0 else 0
    for count, limit, (_, window) in [(by_address, limits[1], MEMORIES[1]), (by_name, limits[2], MEMORIES[2])]:
        at_home = count is by_name and now - pair.signed_in < AT_HOME
        yield min(count.since + window - now, window) if limit and count.failures >= limit and not at_home else 0


def network_of(address):
    """What counts as one address: an IPv4 address, or the /64 network that one IPv6 client has to itself."""
    try:
        ip = ipaddress.ip_address(re.sub(r"^\[(.*)\](:\d+)?$", r"\1", address))
    except ValueError:  # such as `localhost` of a unix socket
        return address[:45] or "unknown"  # '' is all addresses together
    if ip.version == 6 and ip.ipv4_mapped:
        return str(ip.ipv4_mapped)
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network((ip.packed, 64), strict=False))


class HashQueue:
    """As many password hashes at once as there are cores, a queue behind them, and no more.

    `on_change` is told how many sign-ins are inside whenever that changes: a server that has a thread more for each
    keeps the threads that check tokens out of it.
    """

    CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    SIZE = CORES + 64  # a few seconds' work; whoever came after those would wait longer than clients do

    def __init__(self, processes=1):
        self._cores = threading.Semaphore(max(1, self.CORES // processes))
        self._lock, self.inside, self.on_change = threading.Lock(), 0, lambda inside: None

    @contextlib.contextmanager
    def turn(self):
        """A block that hashes. Raises Unavailable at once where the queue is full."""
        self._enter(1)
        try:
            with self._cores:
                yield
        finally:
            self._enter(-1)

    def _enter(self, step):
        with self._lock:
            if self.inside + step > self.SIZE:
                raise Unavailable("Too many sign-ins at once; try again", retry_after=1)
            self.inside += step
            self.on_change(self.inside)


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a handler learns of the caller.

    Without a database `username` and `session` are None: a token does not hold them. A token that was not issued here,
    such as Flask-JWT's, has no session either.
    """

    id: int
    username: str | None = None
    session: Session | None = None


class SignIn:
    """Passwords into sessions, sessions into tokens, tokens into identities.

    `now` is in seconds since 1970. Without a store, a token's claims are all that is known.
    """

    def __init__(self, settings, keys, store=None):
        self.settings, self.keys, self.store = settings, keys, store
        self.hashing = HashQueue(settings.processes)
        self._counting, self._trying = threading.Lock(), collections.Counter()
        self._rounds = settings.pbkdf2_iterations  # what each check costs: as much as the costliest hash seen so far
        self._forwarders = {}  # {address: when to say again that it is not trusted}
        self._touch_from = 0.0

    # Tokens

    def login(self, username, password, now, name="", address=""):
        """Open a session and return its tokens, as the client gets them.

        Raises InvalidCredentials; TooManyRequests, before anything is hashed; Unavailable where too many sign in.
        """
        if not is_text(username) or not is_text(password):
            raise InvalidCredentials
        with self._attempt(username, address, now):
            session = self._open_session(username, password, now, name, address)
        self._prune(now)
        event("login", user=session.user_id, name=username, address=address, session=session.id)
        return self._tokens(session, now)

    def refresh(self, token, now):
        """Return new tokens for a refresh token. Raises InvalidToken, of which SessionEnded, and UnknownUser.

        Each refresh token is good once. The previous one, sent again within RETRY_WINDOW, gets the current one: two
        tabs, or a lost answer. Any older one is a copy in other hands, and ends the session (RFC 9700, 4.14.2).
        """
        sid, generation = self.keys.read_refresh_token(token, now)
        for _ in range(3):  # of several at once one advances the session; the others read again what it has become
            session, _user = self._alive(sid, now)
            if generation == session.generation:
                advanced = self._advanced(session, now)
                if advanced.expires <= now:  # by settings that are newer than the session
                    raise SessionEnded
                if self.store.advance_session(advanced):
                    self._prune(now)
                    event("refresh", user=session.user_id, session=sid)
                    return self._tokens(advanced, now)
            elif generation == session.generation - 1 and self._is_retry(session, now):
                return self._tokens(session, now)
            elif generation < session.generation:
                self.store.end_session(session.user_id, sid)
                event("reuse_detected", logging.WARNING, user=session.user_id, session=sid)
                raise SessionEnded
            else:  # the database is older than the token
                raise InvalidToken("The refresh token is not one of this service")
        raise Unavailable

    def make_api_token(self, identity, name, expires_in, now, address=""):
        """Open a session without refresh and return its token. Raises BadRequest and Forbidden."""
        demand_sign_in(identity)
        if identity.session is None:
            raise Forbidden("This token has no session, for it was not issued here; sign in")
        if not is_name(name):
            raise BadRequest("A token's name has 1 to 255 characters, none of them control characters")
        if type(expires_in) is not int or not 1 <= expires_in <= TOKEN_MAX:
            raise BadRequest(f"expires_in is a whole number of seconds from 1 to {TOKEN_MAX}")
        session = self._new_session(identity.id, name, address, now)
        session = dataclasses.replace(session, generation=0, expires=int(now) + expires_in)
        if not self.store.add_api_token(session, identity.session):
            raise SessionEnded
        self._prune(now)
        event("token_created", user=identity.id, name=name, address=address, session=session.id)
        return self._access_token(session, now, expires_in) | {"id": session.id, "name": name}

    def authenticate(self, token, now):
        """Return the Identity that a token stands for, and its claims. Raises InvalidToken or UnknownUser."""
        claims = self.keys.verify(token, now, self.settings.leeway)
        sid = claims.get("sid") if self.store else None
        if sid is None and claims["exp"] - claims["iat"] > self.settings.token_ttl:  # it could not be taken back
            raise InvalidToken(
                f"A token that lives longer than {self.settings.token_ttl} s is taken only with its session"
            )
        if self.store is None:
            return Identity(claims["identity"]), claims
        if sid is None:
            session, user = None, self.store.get_user(claims["identity"])
            self._demand_user(user)
        else:
            session, user = self._alive(sid, now)
            if user.id != claims["identity"]:
                raise SessionEnded
            self._touch(session, now)
        return Identity(user.id, user.username, session), claims

    # Sessions

    def logout(self, identity, scope):
        """End the session (scope "local"), the user's other ones ("others"), or all ("global"). Raises BadRequest."""
        sid = identity.session.id if identity.session else ""
        if scope in ("others", "global"):
            demand_sign_in(identity)
        if scope == "local" and not sid:
            raise BadRequest("This token has no session to end; it was not issued here, and ends when it expires")
        if scope == "local":
            self.store.end_session(identity.id, sid)
        elif scope in ("others", "global"):
            self.store.end_sessions(identity.id, keep=sid if scope == "others" else "")
        else:
            raise BadRequest("scope is local, others or global")
        event("logout", user=identity.id, session=sid, scope=scope)

    def end_session(self, identity, sid):
        """End one of the caller's sessions. Raises NotFound, and Forbidden."""
        if identity.session and identity.session.id != sid:
            demand_sign_in(identity)
        if not SESSION_ID.fullmatch(sid) or not self.store.end_session(identity.id, sid):
            raise NotFound("There is no such session")
        event("logout", user=identity.id, session=sid, scope="local")

    # Users

    def add_user(self, username, password):
        """Add a user and return the id. Raises BadRequest, which says what is wrong, or Conflict."""
        check_new_username(username)
        check_new_password(password, username)
        user_id = self.store.add_user(username, hash_password(password, self.settings.pbkdf2_iterations))
        event("user_added", user=user_id, name=username)
        return user_id

    def set_password(self, user, password, keep=""):
        """Change a password and end the sessions, save the one whose id is `keep`. Raises BadRequest, Conflict."""
        check_new_password(password, user.username)
        lock = LOCKED if user.is_locked else ""
        self._replace(user, lock + hash_password(password, self.settings.pbkdf2_iterations), keep)
        event("password_changed", user=user.id, name=user.username)

    def change_password(self, identity, current, new, now, address=""):
        """The caller changes the own password; all other sessions end. Raises BadRequest, Forbidden, Conflict.

        A wrong `current` counts as a failed sign-in: a stolen token is no way to guess on. Raises as login does.
        """
        demand_sign_in(identity)
        user = self.store.get_user(identity.id)
        self._demand_user(user)
        check_new_password(new, user.username)
        try:
            with self._attempt(user.username, address, now):
                if not is_text(current) or not verify_password(user.password_hash, current, self._rounds):
                    raise InvalidCredentials
                self.set_password(user, new, keep=identity.session.id if identity.session else "")
        except InvalidCredentials:
            raise BadRequest("current_password is not the current password") from None

    def lock(self, user):
        """Keep a user out until unlocked: the hash is marked, the sessions end. Raises Conflict."""
        if user.is_locked:
            raise Conflict(f"The user {user.username!r} is locked already")
        self._replace(user, LOCKED + (user.password_hash or ""))
        event("user_locked", user=user.id, name=user.username)

    def unlock(self, user):
        """Let a user sign in again with the password from before, and forget the failures of the name."""
        if user.is_locked:
            self._replace(user, user.password_hash[len(LOCKED) :])
        self.store.forget_failures(self.keys.digest(user.username, time.time()))
        event("user_unlocked", user=user.id, name=user.username)

    def remove_user(self, user):
        """Delete a user and end the sessions."""
        self.store.remove_user(user.id)
        event("user_removed", user=user.id, name=user.username)

    def note_forwarder(self, address, now):
        """Say twice a day that a proxy is not trusted: all its clients count as one address. `doctor` tells it, too."""
        if now > self._forwarders.get(address, 0) and len(self._forwarders) < 16:
            self._forwarders[address] = now + DAY / 2
            event("x_forwarded_for_untrusted", logging.WARNING, address=address)
            with contextlib.suppress(AuthError):
                self.store.note_forwarder(address, int(now))

    def close(self):
        if self.store:
            self.store.close()

    # What the rules above are made of

    @contextlib.contextmanager
    def _attempt(self, username, address, now):
        """The block that checks a password, in its turn: refused while throttled, counted where it fails.

        The counts are looked at before the queue, which is no place for those who must wait, and again after it.
        """
        name, network = self.keys.digest(username, now), network_of(address)
        self._demand_patience(name, network, now, username)
        with self.hashing.turn(), self._counted(name, network, now, username) as pair:
            try:
                yield
            except InvalidCredentials:
                event("login_failed", logging.WARNING, name=username[:255], address=address)
                self.store.count_failure(name, network, math.ceil(now), MEMORIES)
                self._prune(now)
                raise
            if pair.failures or now - pair.signed_in > DAY:
                with contextlib.suppress(AuthError):  # the session is there: the sign-in goes on
                    self.store.count_sign_in(name, network, int(now), AT_HOME)

    @contextlib.contextmanager
    def _counted(self, name, network, now, username):
        """Look at the counts again; those who are in this block at the same time see each other as failures."""
        with self._counting:
            pair = self._demand_patience(name, network, now, username)
            self._trying.update((name, network))
        try:
            yield pair
        finally:
            with self._counting:
                self._trying -= collections.Counter((name, network))

    def _demand_patience(self, name, network, now, username):
        limits = self.settings.throttle_pair, self.settings.throttle_address, self.settings.throttle_name
        pair, by_address, by_name = self.store.get_counts(name, network)
        by_address = dataclasses.replace(by_address, failures=by_address.failures + self._trying[network])
        by_name = dataclasses.replace(by_name, failures=by_name.failures + self._trying[name])
        wait = max(waits((pair, by_address, by_name), limits, now))
        if wait > 0:
            event("throttled", logging.WARNING, name=username[:255], address=network, wait=math.ceil(wait))
            raise TooManyRequests(wait)
        return pair

    def _open_session(self, username, password, now, name, address):
        for _ in range(3):  # another sign-in may upgrade the hash between our reading it and our relying on it
            user = self._upgrade(self._check(username, password), password)
            session = self._new_session(user.id, name, address, now)
            if self.store.add_session(session, user.password_hash):
                return session
        raise InvalidCredentials

    def _check(self, username, password):
        """The User of this name and password. Raises InvalidCredentials, after the same work for an unknown name."""
        try:
            user = self.store.find_user(username)
        except Conflict as conflict:  # two rows of one name: nobody can say whose password it is
            event("user_ambiguous", logging.ERROR, error=str(conflict))
            user = None
        stored = user.password_hash if user else None
        bearable = 4 * self.settings.pbkdf2_iterations  # or one absurd row would slow everybody down
        self._rounds = max(self._rounds, min(cost_of(stored), bearable))
        if not verify_password(stored, password, self._rounds):
            raise InvalidCredentials
        return user

    def _upgrade(self, user, password):
        """The User with a hash of today's cost in place of an older one, where that can be stored."""
        if not needs_rehash(user.password_hash, self.settings.pbkdf2_iterations):
            return user
        upgraded = dataclasses.replace(user, password_hash=hash_password(password, self.settings.pbkdf2_iterations))
        try:
            return upgraded if self.store.replace_hash(user, upgraded.password_hash) else user
        except AuthError as error:  # the password was right: the sign-in goes on, the old hash stays good
            event("upgrade_failed", logging.WARNING, user=user.id, error=str(error))
            return user

    def _new_session(self, user_id, name, address, now):
        now = int(now)
        expires = now + min(self.settings.session_ttl, self.settings.session_max)
        sid, kid = secrets.token_urlsafe(16), self.keys.signing_kid(now)
        return Session(sid, user_id, name[:255], address[:45], now, now, expires, 1, now, kid)

    def _advanced(self, session, now):
        now = int(now)
        expires = min(now + self.settings.session_ttl, session.created + self.settings.session_max)
        return dataclasses.replace(
            session,
            generation=session.generation + 1,
            rotated=now,
            last_used=now,
            expires=expires,
            kid=self.keys.signing_kid(now),
        )

    def _is_retry(self, session, now):
        """Is a token of the previous generation the second try of a client that lost the answer?"""
        return -self.settings.leeway <= int(now) - session.rotated <= RETRY_WINDOW

    def _tokens(self, session, now):
        ttl = min(self.settings.token_ttl, session.expires - int(now))
        return self._access_token(session, now, ttl) | {"refresh_token": self.keys.refresh_token(session)}

    def _access_token(self, session, now, ttl):
        iat = int(now)
        claims = {"exp": iat + ttl, "iat": iat, "nbf": iat, "identity": session.user_id, "sub": str(session.user_id)}
        claims |= {"jti": secrets.token_urlsafe(16), "sid": session.id}
        return {"access_token": self.keys.sign(claims), "token_type": "Bearer", "expires_in": ttl}

    def _alive(self, sid, now):
        """The Session of this id and its User. Raises SessionEnded or UnknownUser."""
        session, user = self.store.get_session(sid, now)
        if session is None or session.expires <= now:
            raise SessionEnded
        self._demand_user(user)
        return session, user

    def _demand_user(self, user):
        if user is None:
            raise UnknownUser
        if user.is_locked:
            raise SessionEnded

    def _touch(self, session, now):
        if now - session.last_used >= TOUCH_AFTER and now >= self._touch_from:
            try:
                self.store.touch_session(session, int(now))
            except Unavailable:  # a database that cannot be written to can still be read, and quickly
                self._touch_from = now + TOUCH_AFTER

    def _prune(self, now):
        with contextlib.suppress(AuthError):  # the next sign-in tries again
            self.store.prune_sessions(now, PRUNE_AT_ONCE)
            self.store.prune_counts(now, PRUNE_AT_ONCE)

    def _replace(self, user, password_hash, keep=""):
        if not self.store.set_password(user, password_hash, keep):
            raise Conflict(f"The password of {user.username!r} was changed by another just now; look, then try again")


def open_sign_in(settings):
    """A SignIn whose tables and keys are there, made where they were missing. Raises SettingsError."""
    store = Store.open(settings)
    try:
        store.prepare()
        return SignIn(settings, KeySet.load(settings, create=True), store)
    except BaseException:
        store.close()
        raise


def demand_sign_in(identity):
    """Raise Forbidden for an API token: what it may do is use the API, not decide over its user's account."""
    if identity.session and identity.session.is_api_token:
        raise Forbidden("Only a sign-in can do this, not an API token")


def is_text(value):
    """A string that is not empty and can be written as UTF-8, so that neither SQL nor hashlib meets another."""
    return isinstance(value, str) and value != "" and not re.search("[\ud800-\udfff]", value)


def is_name(value):
    """Text of 1 to 255 characters, none of them control characters."""
    return is_text(value) and len(value) <= 255 and all(unicodedata.category(c) != "Cc" for c in value)


def check_new_username(username):
    if not is_name(username):
        raise BadRequest("A user name is Unicode text of 1 to 255 characters, none of them control characters")
    if username != username.strip():
        raise BadRequest("A user name has no white space at its ends")


# The commonest passwords of at least eight characters, in lists of stolen ones from RockYou (2009) on.
COMMON_PASSWORDS = set(
    """password password1 password12 password123 passw0rd p@ssw0rd p@ssword 12345678 123456789 1234567890 12341234
    11111111 00000000 88888888 87654321 987654321 11223344 123123123 123321123 147258369 qwertyui qwertyuiop qwerty12
    qwerty123 1q2w3e4r 1q2w3e4r5t 1qaz2wsx q1w2e3r4 zaq12wsx asdfghjk asdfghjkl zxcvbnm1 abcd1234 abc12345 a1b2c3d4
    aa123456 iloveyou iloveyou1 sunshine princess football baseball basketball superman batman123 starwars trustno1
    whatever welcome1 welcome123 letmein1 letmein123 changeme changeit admin123 admin1234 administrator michelle
    jennifer computer internet samsung1 dragon123 master123 monkey123 shadow123 secret123 default1""".split()
)


def check_new_password(password, username):
    """Raise BadRequest with the rule that a new password breaks (after NIST SP 800-63B, 5.1.1.2)."""
    if not is_text(password) or not 8 <= len(password) <= 1024:
        raise BadRequest("A password has 8 to 1024 characters of Unicode text")
    if password.casefold() == username.casefold():
        raise BadRequest("A password is not the user name")
    if password.casefold() in COMMON_PASSWORDS:
        raise BadRequest("This password is one of the commonest, which are tried first")


# --- Plugin ---
# Closed by default: a route of an app with this plugin is protected unless its declaration says
# public=True. Never by a mark on the function: a decorator in between would open the door.


class JWTPlugin:
    """Bottle plugin: app.install(JWTPlugin(secret_key=…)) protects every route that does not say public=True.

    Keywords are fields of Settings. With `database`, each request looks its session up there; without, what a token
    claims is believed until it expires, and one that lives longer than token_ttl is refused. With `jwks_url`, keys are
    those that another host publishes. A handler that names `identity` or `claims` as a parameter gets it.
    """

    # No `name`: another plugin of the same name would push this one off a route without a word.
    api = 2

    def __init__(self, sign_in=None, jwks_url=None, **settings):
        if jwks_url and (settings.get("keys") or settings.get("secret_key")):
            raise SettingsError("jwks_url: it takes the place of keys and secret_key; leave those out")
        if sign_in is None:
            checked = Settings(**settings)
            keys = RemoteKeySet(jwks_url) if jwks_url else KeySet.load(checked)
            sign_in = SignIn(checked, keys, Store.open(checked) if "database" in settings else None)
        self.sign_in = sign_in

    def setup(self, app):
        """Refuse what would slip past this plugin: a route with skip=…, a mounted app without a plugin of its own."""
        if any(isinstance(plugin, JWTPlugin) for plugin in app.plugins):
            raise PluginError("this app has a JWTPlugin already; make_app() installs one")
        for route in app.routes:
            self._check_declaration(route, app)
        add_route = app.add_route

        def add_checked_route(route):
            self._check_declaration(route, app)
            add_route(route)

        app.add_route = add_checked_route

    def apply(self, callback, route):
        wanted = wanted_by(route)
        if is_public(route):
            return callback

        def guarded(*args, **values):
            caller = self._caller()
            values.update((name, caller[name]) for name in wanted)
            return callback(*args, **values)

        return guarded

    def close(self):
        self.sign_in.close()

    def _caller(self):
        try:
            token = token_of(request.environ.get("HTTP_AUTHORIZATION", ""))
            identity, claims = self.sign_in.authenticate(token, time.time())
        except AuthError as error:
            if error.status_code == 401:
                self._challenge(error)
            raise
        return {"identity": identity, "claims": claims}

    def _challenge(self, error):
        realm = self.sign_in.settings.realm
        sent = ', error="invalid_token"' if isinstance(error, (InvalidToken, UnknownUser)) else ""
        error.add_header("WWW-Authenticate", f'JWT realm="{realm}"')
        error.add_header("WWW-Authenticate", f'Bearer realm="{realm}"{sent}')

    def _check_declaration(self, route, app):
        where, wanted = f"{route.method} {route.rule}", wanted_by(route)
        guarded = route.app is app or any(isinstance(plugin, JWTPlugin) for plugin in route.app.plugins)
        skipped = any(skip in (True, self, type(self)) for skip in route.skiplist)
        if is_public(route) and wanted:
            raise PluginError(f"{where} is public, so it has no {' and no '.join(wanted)}; take the parameter away")
        if not is_public(route) and (skipped or not guarded):
            raise PluginError(f"{where} would skip JWTPlugin; if that is meant, say public=True")
        if not is_public(route) and re.search(r"[<:](identity|claims)\b", route.rule):
            raise PluginError(f"{where} takes identity or claims from the path; call that part something else")


def wanted_by(route):
    """What the handler names of that which the plugin supplies."""
    try:
        parameters = inspect.signature(route.callback).parameters
    except ValueError:  # some builtins have none
        return set()
    return {"identity", "claims"} & set(parameters)


def is_public(route):
    """Does the route's own declaration say public=True? A key of that name in the app's config opens nothing."""
    return route.config.get("public") is True and "public" not in route.app.config


def token_of(header):
    """The token in an Authorization header: a scheme, blanks, one token (RFC 9110, 11.6.2)."""
    words = [word for word in header.split(" ") if word]  # not split(): that takes U+00A0 for a blank
    if not words:
        raise AuthorizationRequired("Request does not contain an access token")
    if words[0].lower() not in ("jwt", "bearer"):
        raise InvalidHeader("Unsupported authorization type")
    if len(words) == 1:
        raise InvalidHeader("Token missing")
    if len(words) > 2:
        raise InvalidHeader("Token contains spaces")
    return words[1]


# --- HTTP ---
# Short handlers, then the table of routes. Every answer is JSON.

MAX_BODY = 64 * 1024  # bytes; a name and a password need less than 2 KiB


def answer(value, status=200):
    return HTTPResponse(json.dumps(value) + "\n", status, JSON_HEADERS)


def client():
    """What a session keeps of the client that opened it: User-Agent and address."""
    return {"name": request.environ.get("HTTP_USER_AGENT", ""), "address": request.environ.get("REMOTE_ADDR", "")[:45]}


def login(sign_in):
    fields = read_fields()
    if request.environ.get("HTTP_X_FORWARDED_FOR") and not sign_in.settings.trusted_proxy:
        sign_in.note_forwarder(client()["address"], time.time())
    return answer(sign_in.login(fields.get("username"), fields.get("password"), time.time(), **client()))


def refresh(sign_in):
    token = read_fields().get("refresh_token")
    if not isinstance(token, str):
        raise BadRequest("refresh_token is missing, or not a string")
    return answer(sign_in.refresh(token, time.time()))


def logout(sign_in, identity):
    sign_in.logout(identity, read_fields().get("scope", "local"))
    return HTTPResponse(status=204, headers=JSON_HEADERS)


def rest_auth():
    return answer("You are an authenticate person to see this message")


def me(identity):
    session = identity.session and describe(identity.session, identity)
    return answer({"id": identity.id, "username": identity.username, "session": session})


def change_password(sign_in, identity):
    fields = read_fields()
    passwords = fields.get("current_password"), fields.get("new_password")
    sign_in.change_password(identity, *passwords, time.time(), client()["address"])
    return HTTPResponse(status=204, headers=JSON_HEADERS)


def list_sessions(sign_in, identity):
    return answer([describe(session, identity) for session in sign_in.store.list_sessions(identity.id, time.time())])


def end_session(sign_in, identity, sid):
    sign_in.end_session(identity, sid)
    return HTTPResponse(status=204, headers=JSON_HEADERS)


def make_api_token(sign_in, identity):
    fields = read_fields()
    expires_in = fields.get("expires_in", TOKEN_TTL)
    if is_form() and re.fullmatch("[0-9]{1,9}", str(expires_in)):  # a form has nothing but strings
        expires_in = int(expires_in)
    arguments = (identity, fields.get("name"), expires_in, time.time(), client()["address"])
    return answer(sign_in.make_api_token(*arguments), 201)


def describe(session, identity):
    """What its owner may see of a session."""
    shown = {name: getattr(session, name) for name in ("id", "name", "address", "created", "last_used", "expires")}
    is_current = identity.session is not None and session.id == identity.session.id
    return {**shown, "api_token": session.is_api_token, "current": is_current}


def jwks(sign_in):
    body = json.dumps(sign_in.keys.public(time.time())) + "\n"
    etag = f'"{hashlib.sha256(body.encode()).hexdigest()[:32]}"'
    headers = JSON_HEADERS | {"Cache-Control": "public, max-age=600", "ETag": etag}
    if request.environ.get("HTTP_IF_NONE_MATCH") == etag:
        return HTTPResponse(status=304, headers=headers)
    return HTTPResponse(body, headers=headers)


def health(sign_in):
    sign_in.store.ping()
    return answer({"status": "ok"})


def is_form():
    return content_type() == "application/x-www-form-urlencoded"


def content_type():
    return request.content_type.partition(";")[0].strip()


def read_fields():
    """The body, a JSON object or a form, as a dict; {} where there is none. Raises BadRequest or PayloadTooLarge."""
    body = request.body.read(MAX_BODY + 1) if request.content_length <= MAX_BODY else b"x" * (MAX_BODY + 1)
    if len(body) > MAX_BODY:
        raise PayloadTooLarge(f"The body is longer than {MAX_BODY} bytes")
    if not body and not content_type():
        return {}
    try:
        return PARSERS[content_type()](body.decode())
    except KeyError:
        raise BadRequest("Send application/json or application/x-www-form-urlencoded, and say which") from None
    except UnicodeDecodeError:
        raise BadRequest("The body is not UTF-8") from None
    except (ValueError, RecursionError):
        raise BadRequest("The body is not what its Content-Type says") from None


def parse_json(text):
    value = json.loads(text)
    if not isinstance(value, dict):
        raise BadRequest("The body is JSON, but not an object")
    return value


def parse_form(text):
    if text.lstrip().startswith("{"):
        raise BadRequest("The body looks like JSON; send the header Content-Type: application/json with it")
    return dict(parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=20))


PARSERS = {"application/json": parse_json, "application/x-www-form-urlencoded": parse_form}

# What Bottle and waitress refuse by themselves, in our words: theirs are HTML or plain text, and quote the request.
REFUSALS = {
    400: ("Bad Request", "The request cannot be understood"),
    404: ("Not Found", "There is nothing at this path"),
    405: ("Method Not Allowed", "This path does not take this method; the header Allow says which it takes"),
    408: ("Request Timeout", "The request did not come to its end in time"),
    413: ("Content Too Large", "The body is too long"),
    431: ("Request Header Fields Too Large", "The header is too long"),
    501: ("Not Implemented", "The body comes in an encoding that is not chunked"),
}
FAILURE = ("Internal Server Error", "The server failed; its log says how")


def bottle_error(error):
    """An HTTPError as JSON: Bottle's own in our words, a handler's abort() in its. OPTIONS on a known path is none."""
    status, allowed = error.status_code, error.headers.get("Allow")
    if status == 405 and allowed:
        allowed = allowed.replace("GET", "GET,HEAD") + ",OPTIONS"
        response.set_header("Allow", allowed)
        if request.method == "OPTIONS":
            return HTTPResponse(status=204, headers=JSON_HEADERS | {"Allow": allowed})
    name, description = REFUSALS.get(status, FAILURE)
    if "bottle.route" in request.environ and error.exception is None and isinstance(error.body, str):
        name, description = error.status_line.partition(" ")[2], error.body
    response.headers.update(JSON_HEADERS)
    return error_body(status, name, description)


def make_app(settings, sign_in=None):
    """The whole service as a Bottle app, to run, mount, merge or add routes to; app.close() closes its database.

    Missing tables and a missing key file are made. Raises SettingsError.
    """
    sign_in = sign_in or open_sign_in(settings)
    app = Bottle()
    app.default_error_handler = bottle_error
    app.install(JWTPlugin(sign_in))
    app.post("/auth", callback=partial(login, sign_in), public=True)
    app.post("/auth/refresh", callback=partial(refresh, sign_in), public=True)
    app.post("/auth/logout", callback=partial(logout, sign_in))
    app.get("/auth/me", callback=me)
    app.put("/auth/password", callback=partial(change_password, sign_in))
    app.get("/auth/sessions", callback=partial(list_sessions, sign_in))
    app.delete("/auth/sessions/<sid>", callback=partial(end_session, sign_in))
    app.post("/auth/tokens", callback=partial(make_api_token, sign_in))
    app.get("/rest-auth", callback=rest_auth)
    app.get("/.well-known/jwks.json", callback=partial(jwks, sign_in), public=True)
    app.get("/health", callback=partial(health, sign_in), public=True)
    return app


MEANINGS = {  # name, its type, and its meaning
    "requests_total": ("counter", "Requests answered, by route and status."),
    "events_total": ("counter", "Lines of the log, by event."),
    "token_memory_total": ("counter", "Tokens that were found among those verified before, or not."),
    "database_errors_total": ("counter", "Requests that the database failed."),
    "database_reconnects_total": ("counter", "Connections that had died and were replaced."),
    "hash_queue": ("gauge", "Sign-ins that hash, or wait for it."),
    "sessions": ("gauge", "Sessions alive, API tokens included."),
    "process_start_time_seconds": ("gauge", "When the service was started, in seconds since 1970."),
    "process_resident_memory_bytes": ("gauge", "Resident memory, by process."),
}
STATUSES = "200 201 204 304 400 401 403 404 405 408 409 413 429 431 500 501 503 other".split()


def make_counters(app, processes):
    """Counters for the routes of an app, and for all else that is counted."""
    routes = {label_of(route): None for route in app.routes} | {"none": None}
    names = [f'requests_total{{route="{route}",status="{status}"}}' for route in routes for status in STATUSES]
    names += [f'events_total{{event="{what}"}}' for what in EVENTS]
    names += [*TOKEN_MEMORY, "database_errors_total", "database_reconnects_total", "hash_queue", "pid", "start"]
    return Counters(names, processes)


def label_of(route):
    return f"{route.method} {route.rule}".translate({ord(c): f"\\{c}" for c in '"\\'})


def counted(app):
    """The WSGI app, with its answers counted by route and status."""

    def counting(environ, start_response):
        def start(status, *others):
            route = environ.get("bottle.route")
            label = label_of(route) if route else "none"
            code = status[:3] if status[:3] in STATUSES else "other"
            count(f'requests_total{{route="{label}",status="{code}"}}')
            return start_response(status, *others)

        return app(environ, start)

    return counting


def metrics(sign_in):
    """Prometheus's text format: what all processes have counted, and what can be seen now."""
    found = counters.totals()
    for process, pid in enumerate(counters.by_process("pid")):
        with contextlib.suppress(OSError, ValueError):  # a process that has just died; or no Linux
            pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            found[f'process_resident_memory_bytes{{process="{process}"}}'] = pages * resource.getpagesize()
    found["process_start_time_seconds"] = found.pop("start")
    with contextlib.suppress(Unavailable):
        found["sessions"] = sign_in.store.count_alive(time.time())
    found.setdefault("hash_queue", 0)
    lines = []
    for name, (kind, meaning) in MEANINGS.items():
        lines += [f"# HELP rest_auth_{name} {meaning}", f"# TYPE rest_auth_{name} {kind}"]
        lines += [f"rest_auth_{key} {number}" for key, number in found.items() if key.partition("{")[0] == name]
    return HTTPResponse("\n".join(lines) + "\n", headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


def make_metrics_app(sign_in):
    """An app of its own, for a listener of its own: metrics are not for everybody's eyes."""
    app = Bottle()
    app.default_error_handler = bottle_error
    app.get("/metrics", callback=partial(metrics, sign_in))
    return app


# --- Command line ---
# The only room that prints, prompts and ends the process.


REQUEST_TIMEOUT = 30  # seconds that a request may take to arrive
QUIET = 0.5  # seconds in which nobody who has connected sends anything
SMALL_ANSWER = 16 * 1024  # bytes that are sent in one piece: header and body apart would be a system call each


class RequestTimeout(waitress.utilities.BadRequest):
    code = 408
    reason = "Request Timeout"


class StrictParser(HTTPRequestParser):
    """waitress's parser, which also refuses what two readers could read in two ways (RFC 9112, 6), and tricklers."""

    def __init__(self, adj):
        super().__init__(adj)
        self._begun = time.monotonic()

    def received(self, data):
        consumed = super().received(data)
        if not self.completed and time.monotonic() - self._begun > REQUEST_TIMEOUT:
            if not self.headers_finished:
                super().parse_header(b"GET / HTTP/1.0\r\n")  # the least that an answer needs to know
            self.error, self.completed = RequestTimeout(""), True
        return consumed

    def parse_header(self, header_plus):
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # a Content-Length of 5,000 digits, a path that is half a URL
            raise ParsingError("cannot be read") from error
        encodings = re.findall(rb"\ntransfer[-_]encoding[ \t]*:[ \t]*(.*?)[ \t]*\r", header_plus.lower() + b"\r")
        if encodings and (encodings != [b"chunked"] or self.version != "1.1" or "CONTENT_LENGTH" in self.headers):
            raise ParsingError("has a length that is not one")
        if self.version not in ("1.0", "1.1") or "," in self.headers.get("HOST", "," if self.version == "1.1" else ""):
            raise ParsingError("has no version or host that is one")
        if getattr(self.adj, "is_stopping", False):
            self.headers["CONNECTION"] = "close"
        if forwarded := self.headers.get("X_FORWARDED_FOR"):
            self.headers["X_FORWARDED_FOR"] = plain_addresses(forwarded)


def plain_addresses(forwarded):
    """X-Forwarded-For without brackets, ports and mapped IPv4: waitress takes the last colon of these for a port's."""
    plain = re.sub(r"\[([^\]]*)\](:\d+)?", r"\1", forwarded)
    return re.sub(r"(?i)::ffff:(\d+(\.\d+){3})", r"\1", plain)


class StrictChannel(HTTPChannel):
    parser_class = StrictParser


def refusal_of_waitress(error, ident=None):
    """What waitress refuses by itself, in the shape of our errors and without its name."""
    count(f'requests_total{{route="none",status="{error.code}"}}')
    body = error_body(error.code, *REFUSALS.get(error.code, FAILURE)).encode()
    return f"{error.code} {error.reason}", list(JSON_HEADERS.items()), body


def serve(app, settings, announce):
    """Serve until SIGINT or SIGTERM; `announce` gets the URL as soon as the port is ours. Raises SettingsError."""
    waitress.utilities.Error.to_response = refusal_of_waitress  # the one place that all its refusals come through
    with Stop() as stop, listen(settings) as listener:
        scraped = listen_for_metrics(app, settings) if settings.metrics else None
        announce(url_of(listener))
        serving = partial(work, app, settings, stop, listener, scraped)
        if settings.processes == 1:
            serving()
        else:
            supervise(serving, settings.processes, stop, [listener, scraped] if scraped else [listener])


class Stop:
    """`is_set` from the first SIGINT or SIGTERM on, which calls `first`; the others call `second`."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.is_set, self.first, self.second = False, lambda: None, lambda: os._exit(1)

    def __enter__(self):
        self._before = {number: signal.signal(number, self._set) for number in self.SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _set(self, *_):
        call = self.second if self.is_set else self.first
        self.is_set = True
        call()


def work(app, settings, stop, listener, scraped=None):
    """Answer what comes to a listening socket until the stop, and finish what has come by then."""
    options = waitress_settings(settings)
    gauge("pid", os.getpid())
    server = waitress.create_server(counted(app) if counters else app, sockets=[listener], **options)
    server.channel_class = StrictChannel
    server.adj.send_bytes = SMALL_ANSWER
    sign_in = next(plugin.sign_in for plugin in app.plugins if isinstance(plugin, JWTPlugin))

    def note(inside):  # many threads at all times would cost each request: waitress wakes them in turn
        server.task_dispatcher.set_thread_count(settings.threads + inside)
        gauge("hash_queue", inside)

    sign_in.hashing.on_change = note
    if scraped:
        options |= {"threads": 1, "sockets": [scraped]}
        waitress.create_server(make_metrics_app(sign_in), server._map, **options)
    stop.first = server.pull_trigger
    while not stop.is_set:
        turn(server, 1)
    finish(server, settings.stop_timeout)
    server.task_dispatcher.shutdown(timeout=1)
    waitress.wasyncore.close_all(server._map)


def turn(server, seconds):
    """One turn of waitress's loop: wait for what comes, and see to it."""
    waitress.wasyncore.loop(timeout=seconds, use_poll=True, map=server._map, count=1)


def finish(server, seconds):
    """Answer those who have connected, with `Connection: close`, until nobody is left or the time is over.

    Who has just connected may be about to send, so it has to be quiet for a moment.
    """
    server.adj.is_stopping = True
    connected = None
    while connected != len(server.active_channels):  # the system has taken them for us, and would turn them away
        connected = len(server.active_channels)
        server.handle_accept()
    for listener in [each for each in server._map.values() if each.accepting]:
        waitress.wasyncore.dispatcher.close(listener)
    end = time.monotonic() + seconds
    quiet_until = time.monotonic() + QUIET
    while time.monotonic() < min(end, quiet_until):
        turn(server, 0.1)
        channels = [channel for channel in server.active_channels.values() if channel.connected]
        if any(channel.requests or channel.request or channel.total_outbufs_len for channel in channels):
            quiet_until = time.monotonic() + QUIET


def supervise(work, count, stop, listeners):
    """Keep so many child processes at `work`: one that dies is replaced; the stop ends all, and then this."""
    children = {}  # {process id: (its place, from 0 on, and when it was started)}
    alive, mine = os.pipe()  # a child ends when this pipe does: even a parent that is killed leaves none behind

    def end_all(number):
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def first():
        for listener in listeners:
            listener.close()
        end_all(signal.SIGTERM)

    def second():
        end_all(signal.SIGKILL)
        os._exit(1)

    stop.first, stop.second = first, second
    while children or not stop.is_set:
        for place in set(range(count)) - {place for place, _ in children.values()}:
            signal.pthread_sigmask(signal.SIG_BLOCK, Stop.SIGNALS)  # until the child is one that end_all() knows
            if not stop.is_set:
                children[start_child(work, stop, place, alive, mine)] = place, time.monotonic()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, Stop.SIGNALS)
        pid, status = os.waitpid(-1, os.WNOHANG) if children else (0, 0)
        if not pid:
            time.sleep(0.1)  # and not in os.wait(), which a signal that comes just before it does not end
            continue
        _, started = children.pop(pid)
        if not stop.is_set:
            event("process_died", logging.ERROR, pid=pid, status=status)
            time.sleep(0 if time.monotonic() - started > 1 else 1)  # one that cannot start is not tried without pause


def start_child(work, stop, place, alive, mine):
    """Fork, and return the child's process id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            stop.first = stop.second = lambda: (
                None
            )  # Ctrl-C and systemd signal to all, and then the parent does as well
            os.close(mine)
            threading.Thread(target=end_with_parent, args=[alive], daemon=True).start()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, Stop.SIGNALS)
            if counters:
                counters.place = place
                gauge("hash_queue", 0)  # whatever the one before was at when it died
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def listen_for_metrics(app, settings):
    """The socket for GET /metrics; from here on is counted."""
    global counters
    counters = make_counters(app, settings.processes)
    gauge("start", int(time.time()))
    return listen_on(*parse_listener(settings.metrics), "choose another with --metrics")


def end_with_parent(alive):
    os.read(alive, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def listen(settings):
    """The socket to accept on: systemd's where it passes one on (sd_listen_fds(3)), or a unix socket, or TCP."""
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        return socket.socket(fileno=3)
    try:
        if settings.host.startswith("/"):
            return listen_at(settings.host)
    except OSError as error:
        raise SettingsError(f"{settings.host}: {error.strerror}; choose another with --host") from None
    return listen_on(settings.host, settings.port, "choose others with --host and --port")


def listen_on(host, port, advice):
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise SettingsError(f"{host} port {port}: {error.strerror}; {advice}") from None


def listen_at(path):
    """A unix socket, in place of one that nobody listens on any more. Raises OSError."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        if os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode):
            with contextlib.suppress(ConnectionRefusedError), socket.socket(socket.AF_UNIX) as probe:
                probe.settimeout(1)
                with contextlib.suppress(TimeoutError, BlockingIOError):  # a live one that is too busy
                    probe.connect(path)
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            os.unlink(path)
        listener.bind(path)
        os.chmod(path, 0o660)  # for the group of the proxy
        listener.listen()
    except BaseException:
        listener.close()
        raise
    return listener


def url_of(listener):
    address = listener.getsockname()
    if isinstance(address, str):
        return f"unix:{address}"
    host, port = address[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def waitress_settings(settings):
    """waitress's defaults suit an inner network; these suit an open one."""
    return {
        "threads": settings.threads,
        "connection_limit": connection_limit(),
        "asyncore_use_poll": True,  # select() ends the process at the 1,024th descriptor
        "channel_timeout": 30,  # seconds of silence after which a connection is closed
        "cleanup_interval": 5,  # seconds between two looks for silent ones
        "max_request_header_size": 16 * 1024,  # bytes; a token signed with RSA takes 1 KiB
        "max_request_body_size": 2**20,  # bytes; a body up to here is read, so that the client reads our 413
        "ident": None,
        "clear_untrusted_proxy_headers": bool(settings.trusted_proxy),  # else they are noted, and never believed
        **(PROXY | {"trusted_proxy": settings.trusted_proxy} if settings.trusted_proxy else {}),
    }


PROXY = {"trusted_proxy_count": 1, "trusted_proxy_headers": {"x-forwarded-for", "x-forwarded-proto"}}


def behind_proxy(app, settings):
    """The WSGI app for another server than waitress, with what waitress would do about trusted_proxy."""
    waitress.utilities.Error.to_response = refusal_of_waitress
    if not settings.trusted_proxy:
        return app
    believing = proxy_headers_middleware(app, settings.trusted_proxy, **PROXY)

    def believing_plain_addresses(environ, start_response):
        environ["REMOTE_ADDR"] = environ.get("REMOTE_ADDR") or "localhost"  # of a unix socket
        if forwarded := environ.get("HTTP_X_FORWARDED_FOR"):
            environ["HTTP_X_FORWARDED_FOR"] = plain_addresses(forwarded)
        return believing(environ, start_response)

    return believing_plain_addresses


def connection_limit(wanted=4096, reserved=100):
    """Connections to hold at once. Past the descriptors of the process accept() would spin on EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted + reserved if hard == resource.RLIM_INFINITY else min(wanted + reserved, hard)
    if limit < 2 * reserved:
        raise SettingsError(f"this process may open {limit} files; it needs {2 * reserved}: raise ulimit -n")
    if soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit - reserved


def serve_command(settings, args):
    """Serve until the end, with what is missing made first."""
    keys = "AUTH_SECRET_KEY" if settings.secret_key else settings.keys
    if args.demo:
        settings, keys = demo_settings(settings, vars(args)), "memory"
    with contextlib.closing(open_sign_in(settings)) as sign_in:
        if args.demo:
            sign_in.store.add_user("roy", hash_password("roy", settings.pbkdf2_iterations))

        def announce(url):
            print(f"rest-auth {__version__} on {url}, users in {sign_in.store.database}, keys in {keys}")
            print(DEMO.format(url=url) if args.demo else "", end="", flush=True)

        set_logging_up()
        app = make_app(settings, sign_in)
        if settings.processes > 1:
            sign_in.close()  # the children open connections of their own
        args.serve(app, settings, announce)


def set_logging_up():
    """To stderr: our own lines as they are, JSON each; those of libraries as text."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    lines = logging.StreamHandler()
    lines.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(lines)
    log.propagate = False
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it has a line for every request that waits


def __getattr__(name):
    """`gunicorn server:app`: an app from the AUTH_ variables, made when it is first asked for."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    set_logging_up()
    settings = Settings.load()
    globals()["app"] = behind_proxy(make_app(settings), settings)
    return globals()["app"]


DEMO = """\
Sign in as roy, then open the tutorial's protected route:
  TOKEN=$(curl -s -d username=roy -d password=roy {url}/auth | cut -d'"' -f4)
  curl -H "Authorization: Bearer $TOKEN" {url}/rest-auth
"""


def demo_settings(settings, flags):
    """Everything in memory, and on loopback only: the whole world knows roy's password."""
    if "database" in flags or "keys" in flags:
        raise SettingsError("--demo keeps users and keys in memory; leave --database and --keys out")
    if settings.processes > 1:
        raise SettingsError("--demo keeps users in the memory of one process; leave --processes out")
    if not is_loopback(settings.host):
        raise SettingsError(f"--demo listens on loopback only, not on {settings.host}; leave --host and AUTH_HOST out")
    nowhere = os.path.join(os.devnull, "keys")
    return dataclasses.replace(settings, database="sqlite://", secret_key=secrets.token_urlsafe(32), keys=nowhere)


def init_command(settings, args):
    """Make the tables that are missing."""
    with contextlib.closing(Store.open(settings)) as store:
        store.prepare()
        print(f"tables are ready in {store.database}")


def user_command(settings, args):
    with contextlib.closing(Store.open(settings)) as store:
        if args.action not in (user_add, user_import):
            demand_file(store)
        store.prepare()
        args.action(SignIn(settings, None, store), args)


def demand_file(store):
    """Raise SettingsError rather than make an empty database, which is never what a question is about."""
    if store.database.kind == "sqlite" and not os.path.exists(store.database.name):
        raise SettingsError(f"{store.database}: there is no such file here; --database names another")


def user_add(sign_in, args):
    """Add a user; the password comes from a prompt or from standard input."""
    check_new_username(args.name)
    if sign_in.store.find_user(args.name):
        raise Conflict(f"There is a user {args.name!r} already")
    sign_in.add_user(args.name, new_password())
    print(f"user {args.name} added to {sign_in.store.database}")


def user_passwd(sign_in, args):
    """Change a user's password, from a prompt or standard input, and end the sessions. A locked user stays locked."""
    user = named_user(sign_in.store, args.name)
    sign_in.set_password(user, new_password())
    print(f"password of {args.name} changed, sessions ended")


def user_list(sign_in, args):
    """List users: id, user name, method of the password hash, number of sessions."""
    sessions = sign_in.store.count_sessions(time.time())
    for user in sign_in.store.each_user():
        hashed = read_hash(user.password_hash)
        method = f"{hashed.method}:{hashed.rounds}".removesuffix(":0") if hashed else "no usable hash"
        state = "locked" if user.is_locked else method
        name = user.username or "(no name)"
        print(f"{user.id}\t{name if name.isprintable() else ascii(name)}\t{state}\t{sessions.get(user.id, 0)}")


def user_export(sign_in, args):
    """Write all users to standard output, a line of JSON each: user name and password hash."""
    nameless = 0
    for user in sign_in.store.each_user():
        if user.username:
            print(json.dumps({"username": user.username, "password_hash": user.password_hash or ""}))
        else:
            nameless += 1
    if nameless:
        print(f"server.py: {nameless} users have no name and were left out", file=sys.stderr)


def user_import(sign_in, args):
    """Add the users of an export, read from standard input: all, or none where one cannot be added."""
    if sys.stdin is None or sys.stdin.isatty():
        raise BadRequest("Give the export on standard input: user import < FILE")
    users = [read_exported(line, number) for number, line in enumerate(sys.stdin, 1) if line.strip()]
    if not users:
        raise BadRequest("Standard input holds no users; nothing was imported")

    def progress(done):
        if sys.stderr.isatty():
            print(f"\r{done:,} of {len(users):,}", end="", file=sys.stderr, flush=True)

    count = sign_in.store.add_users(users, args.skip_existing, progress)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    event("users_imported", number=count)
    left = f", {len(users) - count} left out, whose names were there" if args.skip_existing else ""
    print(f"{count} users imported into {sign_in.store.database}{left}")


def read_exported(line, number):
    """(user name, password hash) of one line. Raises BadRequest, which does not repeat the hash."""
    try:
        user = json.loads(line.removeprefix("\ufeff"))  # which some editors put there
        username, password_hash = user["username"], user["password_hash"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadRequest(f'Line {number} is not {{"username": …, "password_hash": …}}; nothing was imported') from None
    if not is_text(username) or len(username) > 255:
        raise BadRequest(f"Line {number}: a user name is text of 1 to 255 characters; nothing was imported")
    if not isinstance(password_hash, str) or not read_hash(password_hash.removeprefix(LOCKED)):
        raise BadRequest(f"Line {number}: {username!r} has no hash that sign-in can verify; nothing was imported")
    return username, password_hash


def user_logout(sign_in, args):
    """End all sessions of a user, API tokens included."""
    count = sign_in.store.end_sessions(named_user(sign_in.store, args.name).id)
    print(f"{count} sessions of {args.name} ended")


def user_lock(sign_in, args):
    """Keep a user out: no password is accepted any more, and the sessions end."""
    sign_in.lock(named_user(sign_in.store, args.name))
    print(f"user {args.name} locked, sessions ended")


def user_unlock(sign_in, args):
    """Let a locked user sign in again, with the password from before, and forget failed sign-ins."""
    sign_in.keys = KeySet.load(sign_in.settings)  # failures are counted under digests that the key makes
    sign_in.unlock(named_user(sign_in.store, args.name))
    print(f"user {args.name} unlocked")


def user_remove(sign_in, args):
    """Remove a user and end the user's sessions."""
    sign_in.remove_user(named_user(sign_in.store, args.name))
    print(f"user {args.name} removed")


def key_list(settings, args):
    """List keys: kid, algorithm, what it is for, where it is."""
    secret = Key.from_secret(settings.secret_key).kid if settings.secret_key else ""
    for number, key in enumerate(KeySet.load(settings).keys):
        use = "verifies" if number else "signs and verifies"
        print(f"{key.kid}\t{key.algorithm}\t{use}\t{'AUTH_SECRET_KEY' if key.kid == secret else settings.keys}")


def key_rotate(settings, args):
    """Add a new key, which signs from now on; the others go on verifying."""
    say_signs(rotate_key_file(settings.keys, args.alg), settings)


def key_add(settings, args):
    """Add a new key that only verifies, until `key promote`: to hand it out to other hosts first."""
    key = rotate_key_file(settings.keys, args.alg, signs=False)
    event("key_rotated", verify=[key.kid])
    print(f"{key.kid} is added to {settings.keys}; once all hosts have that file: server.py key promote {key.kid}")


def key_promote(settings, args):
    """Let a key that is there sign from now on; the others go on verifying."""
    say_signs(promote_key(settings.keys, args.kid), settings)


def say_signs(key, settings):
    event("key_rotated", signs=key.kid)
    print(f"{key.kid} signs now, with {key.algorithm}, from {settings.keys}")


def key_retire(settings, args):
    """Take a key away: whatever it has signed, refresh tokens included, is refused from now on."""
    if settings.secret_key and args.kid == Key.from_secret(settings.secret_key).kid:
        raise SettingsError("this key is AUTH_SECRET_KEY; to retire it, unset the variable and start the service again")
    first = retire_key(settings.keys, args.kid)
    event("key_retired", kid=args.kid, signs=first.kid)
    print(f"{args.kid} is retired, {first.kid} signs, with {first.algorithm}")


def named_user(store, name):
    user = store.find_user(name) if is_text(name) else None
    if user is None:
        raise NotFound(f"There is no user {name!r}; `user list` shows who there is")
    return user


def new_password():
    """A password, asked for twice at a terminal, else the first line of standard input: never an argument."""
    if sys.stdin is None:
        raise BadRequest("There is no standard input to read the password from")
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    password = getpass.getpass("New password: ")
    if getpass.getpass("Again: ") != password:
        raise BadRequest("The two passwords differ; nothing was changed")
    return password


def doctor_command(settings, args):
    """Say what is wrong with this installation, and how to mend each; exit status 1 where anything is."""
    with contextlib.closing(Store.open(settings)) as store:
        demand_file(store)
        problems = [*doctor_settings(settings), *doctor_files(settings), *doctor_network(settings)]
        try:
            problems += doctor_store(settings, store)
        except Unavailable as failure:
            problems.append(store.advice(failure.__cause__))
        for problem in problems:
            print(problem)
        if problems:
            return 1
        print(f"all is well with {store.database}")
    return 0


def doctor_files(settings):
    """Key file, its modes, SQLite's file, and what is missing for them."""
    try:
        if settings.secret_key or os.path.lexists(settings.keys):  # else the first start makes the file
            KeySet.load(settings)
    except SettingsError as error:
        yield str(error)
    database = parse_database(settings.database)
    if database.kind == "sqlite" and os.path.exists(database.name):
        mode = os.stat(database.name).st_mode & 0o777
        if mode & 0o007:
            yield f"{database}: open to others (mode {mode:04o}); run: chmod 600 {database.name}"
    if importlib.util.find_spec("cryptography") is None:
        yield "cryptography is missing, which EdDSA, ES256, RS256 and MySQL 8 need; pip install -r requirements.txt"


def doctor_network(settings):
    if not is_loopback(settings.host) and not settings.trusted_proxy:
        yield f"host {settings.host} is open without TLS; put a proxy in front, and name it in AUTH_TRUSTED_PROXY"


def doctor_settings(settings):
    if settings.pbkdf2_iterations < Settings.pbkdf2_iterations:
        yield f"pbkdf2_iterations is {settings.pbkdf2_iterations}; fewer than the default are quickly guessed through"
    for name in ("throttle_pair", "throttle_address", "throttle_name"):
        if not getattr(settings, name):
            yield f"{name} is 0: nothing slows guessing down; leave it out"


def doctor_store(settings, store):
    """Tables, rows, the database's clock and its connection."""
    missing = store.missing_tables()
    if missing:
        yield f"{store.database}: no table {' and no table '.join(missing)}; run: server.py init"
    else:
        for address in store.get_forwarders(time.time()):
            if address != settings.trusted_proxy:
                yield f"X-Forwarded-For came from {address} today: if that is your proxy, name it in AUTH_TRUSTED_PROXY"
        with contextlib.suppress(SettingsError):  # which doctor_files tells
            kids = {key.kid for key in KeySet.load(settings).keys}
            for kid in set(store.kids_since(time.time() - 3600)) - kids:
                yield f"key {kid} signed in the last hour and is not here; copy the key file from the host that has it"
    for problem in store.failing_hosts():
        yield f"{store.database}: {problem}; mend that host, or take it out of the URL"
    ahead = store.clock() - time.time()
    if abs(ahead) > settings.leeway:
        yield f"{store.database}: its clock is {ahead:+.0f} s from this machine's; run NTP on both"
    if not store.is_private():
        yield f"{store.database}: another host, and no TLS; add ?ssl_ca=FILE to AUTH_DATABASE"
    if "user" not in missing:
        yield from doctor_users(settings, store.list_users())


def doctor_users(settings, users):
    usable = [user.password_hash for user in users if read_hash(user.password_hash)]
    weak = [stored for stored in usable if needs_rehash(stored, settings.pbkdf2_iterations)]
    if weak:
        yield f"{len(weak)} of {len(users)} users have hashes below pbkdf2_iterations; they are upgraded at sign-in"
    names = collections.Counter(user.username for user in users)
    for user in users:
        if not user.is_locked and not read_hash(user.password_hash):
            yield f"user {user.id} ({user.username!r}) has no usable hash; run: server.py user passwd {user.username}"
        if not user.username:
            yield f"user {user.id} has no name and cannot sign in; delete the row, or name it"
        elif names[user.username] > 1:
            many = names[user.username]
            yield f"user {user.id} is one of {many} named {user.username!r}; rename all but one with SQL"


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and do not repeat what may be a secret in the wrong place."""

    def error(self, message):
        message = re.sub(r"(unrecognized arguments|invalid choice): .*?( \(choose from .*)?$", r"\1\2", message)
        self.exit(2, f"server.py: {message}; see {self.prog} --help\n")

    def parse_known_args(self, args=None, namespace=None):
        for word in args or ():
            flag = word.partition("=")[0]
            if flag.startswith("--") and flag != "--" and flag not in ALL_FLAGS:
                meant = difflib.get_close_matches(flag, ALL_FLAGS, 1)
                self.error(f"there is no {flag}" + (f"; did you mean {meant[0]}?" if meant else ""))
        return super().parse_known_args(args, namespace)


def flag_of(field):
    return "--" + field.name.replace("_", "-")


ALL_FLAGS = ["--help", "--version", "--demo", "--alg", "--skip-existing"]
ALL_FLAGS += [flag_of(field) for field in dataclasses.fields(Settings) if field.metadata["flag"]]


def make_parser():
    parser = Parser(prog="server.py", description=__doc__.partition("\n")[0], epilog=EPILOG, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"rest-auth {__version__}")
    parser.set_defaults(command=serve_command, demo=False)
    add_serve_flags(parser)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    def add(commands, name, run, *settings, **defaults):
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__, allow_abbrev=False)
        command.set_defaults(**defaults)
        if settings:
            add_settings(command, *settings)
        return command

    add_serve_flags(add(commands, "serve", serve_command, command=serve_command))
    add(commands, "init", init_command, "database", command=init_command)
    every = [field.name for field in dataclasses.fields(Settings)]
    add(commands, "doctor", doctor_command, *every, command=doctor_command)
    user = commands.add_parser("user", help="add, change, list, lock and remove users")
    actions = user.add_subparsers(title="actions", metavar="ACTION", required=True)
    for name, action in USER_ACTIONS.items():
        used = {user_add: ["pbkdf2_iterations"], user_passwd: ["pbkdf2_iterations"], user_unlock: ["keys"]}
        one = add(actions, name, action, "database", *used.get(action, ()), command=user_command, action=action)
        if action is user_import:
            text = "leave out users whose names are there already; without it, they refuse the whole import"
            one.add_argument("--skip-existing", action="store_true", help=text)
        elif action not in (user_list, user_export):
            one.add_argument("name", metavar="NAME")
    key = commands.add_parser("key", help="list, add and retire the keys that sign tokens")
    actions = key.add_subparsers(title="actions", metavar="ACTION", required=True)
    add(actions, "list", key_list, "keys", command=key_list)
    for name, run in [("rotate", key_rotate), ("add", key_add)]:
        command = add(actions, name, run, "keys", command=run)
        command.add_argument("--alg", choices=ALGORITHMS, help="(default: that of the key that signs now)")
    for name, run in [("promote", key_promote), ("retire", key_retire)]:
        add(actions, name, run, "keys", command=run).add_argument("kid", metavar="KID")
    return parser


def add_serve_flags(parser):
    text = "serve from memory with the user roy, password roy"
    parser.add_argument("--demo", action="store_true", default=argparse.SUPPRESS, help=text)
    add_settings(parser, *(field.name for field in dataclasses.fields(Settings)))


def add_settings(parser, *names):
    group = parser.add_argument_group("settings", "each is also a variable, such as AUTH_DATABASE for --database")
    for field in dataclasses.fields(Settings):
        if field.name in names and field.metadata["flag"]:
            text = field.metadata["meaning"] + (f" (default: {field.default})" if field.default != "" else "")
            kind = "NUMBER" if field.type is int else "TEXT"
            group.add_argument(flag_of(field), metavar=kind, help=text, default=argparse.SUPPRESS)


USER_ACTIONS = {
    "add": user_add,
    "passwd": user_passwd,
    "list": user_list,
    "export": user_export,
    "import": user_import,
    "logout": user_logout,
    "lock": user_lock,
    "unlock": user_unlock,
    "remove": user_remove,
}

EPILOG = """The secret has no flag, for every user of a machine can read the arguments of every process: put it into the
variable AUTH_SECRET_KEY, or leave it out and a key file is made. Exit status: 0 good, 1 failed, 2 wrong usage."""


def read_settings(args):
    names = {field.name for field in dataclasses.fields(Settings)}
    flags = {name: value for name, value in vars(args).items() if name in names}
    if "database" in flags and parse_database(flags["database"]).password:
        raise SettingsError("database: every user of this machine can read a flag; put it into AUTH_DATABASE")
    return Settings.load(**flags)


def main(argv=None, serve=serve):
    """Run the command line and return the exit status: 0 good, 1 failed, 2 wrong usage."""
    log.addHandler(logging.NullHandler())  # commands print; serve_command sets logging up
    try:
        args = make_parser().parse_args(sys.argv[1:] if argv is None else argv, argparse.Namespace(serve=serve))
        if args.demo and args.command is not serve_command:
            raise SettingsError("--demo serves, and goes with no other command")
        status = args.command(read_settings(args), args)
        sys.stdout.flush()
        return status or 0
    except SystemExit as stop:
        return stop.code or 0
    except BrokenPipeError:  # the reader, such as `head`, has enough; what Python flushes at its end goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (SettingsError, AuthError, OSError, UnicodeError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        print(f"server.py: {error}{cause}", file=sys.stderr)
    except KeyboardInterrupt:
        print("server.py: interrupted; nothing was changed", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
