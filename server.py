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
"""JWT login for REST APIs and web apps on small hosts, in one file.

    python server.py --demo
    TOKEN=$(curl -s -d username=roy -d password=roy http://127.0.0.1:5000/auth | cut -d'"' -f4)
    curl -H "Authorization: Bearer $TOKEN" http://127.0.0.1:5000/rest-auth

The file reads from top to bottom: a section uses only sections above it. README.md lists the routes and the settings.
"""

import argparse
import base64
import contextlib
import dataclasses
import datetime
import errno
import fcntl
import functools
import getpass
import hashlib
import hmac
import inspect
import ipaddress
import itertools
import json
import logging
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
import weakref
from collections import namedtuple
from functools import partial
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qsl, unquote

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(f"server.py: Python 3.10 or newer is needed; this is {sys.version.split()[0]}")
try:
    import jwt
    import waitress
    from bottle import Bottle, HTTPResponse, PluginError, request, response
    from jwt.utils import base64url_encode
    from waitress.channel import HTTPChannel
    from waitress.parser import HTTPRequestParser, ParsingError
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"server.py: {error.name} is not installed; run: {sys.executable} -m pip install -r requirements.txt")

__version__ = "0.3.0"

# --- Settings ---
# Each setting once, with its unit. The field access_token_ttl is the flag --access-token-ttl and the variable
# AUTH_ACCESS_TOKEN_TTL. A wrong or misspelt setting stops the start, because a wrong default could leave a route open.

DAY = 86400  # seconds
NO_LIMIT = 10**9
CACHE_SIZE = 4096  # verified tokens, and sessions, that a process keeps: a few MiB


class ConfigError(ValueError):
    """The operator must fix something first. The text says what is wrong and how to fix it."""


def is_address(text):
    try:
        return bool(ipaddress.ip_address(text))
    except ValueError:
        return False


def option(default, help, rule="[^\0\r\n]+", is_secret=False):
    """A field of Settings. `rule`: bounds of an integer, or a pattern of text. A secret is not in the repr."""
    return dataclasses.field(default=default, repr=not is_secret, metadata={"help": help, "rule": rule})


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings, checked when made: Settings(port=80), or Settings.load() to read the environment."""

    database: str = option("sqlite:///auth.db", "URL of the database, sqlite:///FILE or mysql://…", is_secret=True)
    host: str = option("127.0.0.1", "address to listen on, or absolute path of a unix socket")
    port: int = option(5000, "port to listen on, 0 for a free one", (0, 65535))
    secret_key: str = option("", "HS256 secret, 32 bytes or more; beside a key file it only verifies", "[^\0]*", True)
    key_file: str = option("auth.keys", "private JWK Set, made by the first start if there is no secret_key")
    access_token_ttl: int = option(300, "lifetime of an access token in seconds", (1, DAY))
    session_idle_timeout: int = option(30 * DAY, "lifetime of a session without a refresh in seconds", (1, 3650 * DAY))
    session_max_age: int = option(90 * DAY, "longest lifetime of a session in seconds", (1, 3650 * DAY))
    session_cache_ttl: int = option(0, "number of seconds that MySQL sessions are cached; SQLite needs none", (0, 60))
    leeway: int = option(10, "number of seconds that the clocks of two hosts may differ", (0, 300))
    pbkdf2_iterations: int = option(600_000, "cost of a password hash; the default is OWASP's minimum", (1, 9_999_999))
    login_limit: int = option(5, "number of failed logins of a username from an address; 0 is off", (0, NO_LIMIT))
    threads: int = option(16, "number of requests answered at once, besides logins", (1, 256))
    trusted_proxy: str = option("", "IP address of the proxy whose X-Forwarded-For counts, or localhost", "[^\0]*")
    realm: str = option("Login Required", "realm that a 401 names, without quotes", r'[^\0-\x1f"\\\x7f]+')

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, rule = getattr(self, field.name), field.metadata["rule"]
            if field.type is int:
                is_good = type(value) is int and rule[0] <= value <= rule[1]
            else:
                is_good = isinstance(value, str) and re.fullmatch(rule, value)
            if field.name == "trusted_proxy":
                is_good = is_good and (value in ("", "localhost") or is_address(value))
            if not is_good:
                flag = "" if field.name == "secret_key" else f", --{field.name.replace('_', '-')}"
                bounds = f", from {rule[0]} to {rule[1]}" if field.type is int else ""
                where = f"{field.name} (AUTH_{field.name.upper()}{flag})"
                raise ConfigError(f"{where} is wrong; it is the {field.metadata['help']}{bounds}")
        parse_database(self.database)
        if self.secret_key:
            check_secret(self.secret_key.encode("utf-8", "surrogateescape"))

    @classmethod
    def load(cls, environ=os.environ, **flags):
        """Settings from AUTH_ variables; `flags` beat them, an empty variable is unset. Raises ConfigError."""
        fields = {f"AUTH_{field.name.upper()}": field for field in dataclasses.fields(cls)}
        for name in environ:
            if name.startswith("AUTH_") and name not in fields:
                raise ConfigError(f"{name} is not a setting; the settings are {', '.join(fields)}")
        values = {field.name: environ[name] for name, field in fields.items() if environ.get(name)} | flags
        for field in fields.values():
            if field.type is int and field.name in values:
                values[field.name] = to_integer(values[field.name])
        return cls(**values)


def to_integer(text):
    return int(text) if re.fullmatch("[0-9]{1,18}", str(text)) else text  # to be refused later


def is_loopback(host):
    return host == "localhost" or host.startswith("/") or (is_address(host) and ipaddress.ip_address(host).is_loopback)


# Secrets published in manuals.
EXAMPLE_SECRETS = """a-string-secret-at-least-256-bits-long
    09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7
    a-valid-string-secret-that-is-at-least-512-bits-long-which-is-very-long""".split()


def check_secret(secret):
    """Raise ConfigError for bytes that others could guess. A repetition is found inside its own double."""
    if len(secret) < 32 or secret in (secret * 2)[1:-1] or secret.decode("latin-1") in EXAMPLE_SECRETS:
        advice = "make one: python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"
        raise ConfigError(f"secret_key, or one in key_file, is below 32 bytes, repeats itself or is known; {advice}")


@dataclasses.dataclass(frozen=True)
class Database:
    """A parsed database URL. str() leaves the password out."""

    scheme: str  # "sqlite" or "mysql"
    name: str  # of SQLite's file, "" for memory; or of the MySQL database
    user: str = ""
    password: str = dataclasses.field(default="", repr=False)
    hosts: tuple = ()  # of (host, port), tried in this order
    options: dict = dataclasses.field(default_factory=dict)  # for pymysql.connect

    def __str__(self):
        if self.scheme == "sqlite":
            return os.path.abspath(self.name) if self.name else "memory"
        hosts = ",".join(f"{host}:{port}" for host, port in self.hosts)
        return f"mysql://{self.user}@{self.options.get('unix_socket', hosts)}/{self.name}"


SQLITE_URL = re.compile(r"sqlite://(?:/((?:(?!%00)[^?#])+))?")
MYSQL_HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[^][:,/@?#]*)(?::[1-9][0-9]{0,4})?"
MYSQL_URL = re.compile(rf"mysql://([^:@/?#]+)(?::([^@/?#]*))?@({MYSQL_HOST}(?:,{MYSQL_HOST})*)/([^/?#]+)(?:\?([^#]*))?")
MYSQL_OPTIONS = {"connect_timeout": "[1-9][0-9]?", "read_timeout": "[2-9]|[1-9][0-9]", "unix_socket": "[^\0]+"}
MYSQL_OPTIONS |= {"ssl_verify_identity": "true|false", "ssl_ca": "[^\0]+", "ssl_cert": "[^\0]+", "ssl_key": "[^\0]+"}


def parse_database(url):
    """Return the Database of a URL. Raises ConfigError, which never repeats the URL: it may hold a password."""
    if match := SQLITE_URL.fullmatch(url):
        name = unquote(match[1] or "")
        return Database("sqlite", "" if name == ":memory:" else name)
    if match := MYSQL_URL.fullmatch(url):
        user, password, hosts, name, query = match.groups(default="")
        pairs = [re.fullmatch(r"\[?(.*?)\]?(?::(\d+))?", host) for host in hosts.split(",")]
        hosts = tuple((pair[1] or "localhost", int(pair[2] or 3306)) for pair in pairs)
        if all(port < 2**16 for _, port in hosts):
            return Database("mysql", unquote(name), unquote(user), unquote(password), hosts, mysql_options(query))
    raise ConfigError(
        "database must be sqlite:///FILE (a fourth slash begins an absolute path), sqlite:// for memory, or mysql://"
        "USER:PASSWORD@HOST:PORT/NAME with % : @ / ? # in a password as %25 %3A %40 %2F %3F %23 (AUTH_DATABASE)"
    )


def mysql_options(query):
    """Return keyword arguments of pymysql.connect for the options after `?`. Raises ConfigError."""
    options = {"connect_timeout": "5", "read_timeout": "7", **dict(parse_qsl(query, keep_blank_values=True))}  # seconds
    for name, value in options.items():
        if not re.fullmatch(MYSQL_OPTIONS.get(name, "(?!)"), value) or (name[:3] == "ssl" and "ssl_ca" not in options):
            raise ConfigError(f"database: an option is unknown, wrong or lacks ssl_ca: {', '.join(MYSQL_OPTIONS)}")
        if name.startswith("ssl") and not name.endswith("identity") and not os.access(value, os.R_OK):
            raise ConfigError(f"database: {name} names {value}, which does not exist or is not readable")
    options |= {"connect_timeout": int(options["connect_timeout"]), "read_timeout": int(options["read_timeout"])}
    options["write_timeout"] = options["read_timeout"]  # 2 s or more, as _set_up lets a wait for a lock take half of it
    if "ssl_ca" in options:  # PyMySQL checks neither certificate nor host name unless told to
        options |= {"ssl_verify_cert": True, "ssl_verify_identity": options.get("ssl_verify_identity") != "false"}
    return options


# --- Errors and log ---
# Every refusal is one exception. It is Bottle's own response exception, so any app that a route is merged or mounted
# into sends it unchanged. The log is one JSON object per line, so that text from a client stays inside its quotes.

# No browser may take an answer for HTML, and no cache may keep it: it is for one caller, now.
JSON_HEADERS = {"Content-Type": "application/json", "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}


def error_body(status, error, description):
    return json.dumps({"status_code": status, "error": error, "description": description}) + "\n"


class AuthError(HTTPResponse):
    """The request is refused: AuthError("There is no such session", 404). str() is the description."""

    defaults = {"description": "", "status": 401, "error": None, "retry_after": None}
    reason = ""  # why the token does not suffice, as parameters of the Bearer challenge (RFC 6750, 3.1)

    def __init_subclass__(cls, **defaults):
        cls.defaults = cls.defaults | defaults

    def __init__(self, description=None, status=None, error=None, retry_after=None):
        """`error` is the name in the body, else that of the status. `retry_after` is in seconds."""
        status = status or self.defaults["status"]
        retry_after = retry_after or self.defaults["retry_after"]
        self.error = error or self.defaults["error"] or HTTPStatus(status).phrase
        self.args = (description or self.defaults["description"],)
        headers = JSON_HEADERS | ({"Retry-After": str(retry_after)} if retry_after else {})
        super().__init__(error_body(status, self.error, *self.args), status, headers)

    def add_challenges(self, realm, basic=False):
        """Add WWW-Authenticate to a 401, and to a 403 that has a reason (RFC 9110, 11.6.1)."""
        challenges = [f'Bearer realm="{realm}"{self.reason}'] if self.status_code == 401 or self.reason else []
        if self.status_code == 401:
            challenges = [f'JWT realm="{realm}"', *challenges] + [f'Basic realm="{realm}", charset="UTF-8"'] * basic
        for challenge in challenges:
            self.add_header("WWW-Authenticate", challenge)


class BadRequest(AuthError, status=400):
    """The request cannot be understood, or a value in it is not allowed."""


class InvalidCredentials(AuthError, error="Bad Request", description="Invalid credentials"):
    """The username or password is wrong, missing, empty or not a string. The words are Flask-JWT's."""


class InvalidToken(AuthError, error="Invalid token", description="Session has ended"):
    """The token does not verify, or its session has ended."""

    reason = ', error="invalid_token"'


class Forbidden(AuthError, status=403):
    """The token is good, but not for this: a role is missing, or the API token is read-only."""

    def __init__(self, description, roles=()):
        super().__init__(description)
        scope = f', scope="{" ".join(sorted(roles))}"' if roles else ""
        self.reason = f', error="insufficient_scope"{scope}'


class Conflict(AuthError, status=409):
    """The request contradicts the stored data, such as a second user of one username."""


class Unavailable(AuthError, status=503, description="The database does not answer; try again", retry_after=2):
    """The database does not answer, or too many logins run at once. The same request may succeed in a moment."""


log = logging.getLogger("auth")


def log_event(event, level=logging.INFO, **fields):
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
    log.log(level, json.dumps({"time": now, "event": event, **fields}))


# --- Passwords ---
# PBKDF2 through hashlib, in werkzeug's format, which the other programs of a Flask-JWT table can read, too.
# Malformed hashes do not match. They never raise.

ParsedHash = namedtuple("ParsedHash", "method iterations derive digest")  # derive(password bytes) must equal digest


def parse_pbkdf2(name, iterations, salt, digest):
    derive = partial(hashlib.pbkdf2_hmac, name, salt=salt.encode(), iterations=int(iterations))
    decode = base64.b64decode if digest.endswith("=") else bytes.fromhex
    return ParsedHash(f"pbkdf2:{name}", int(iterations), derive, decode(digest))


def parse_scrypt(n, r, p, salt, digest):
    if int(n) * int(r) * int(p) > 2**22:  # four times OWASP's advice; each login would cost this
        raise ValueError("too costly")
    costs = {"n": int(n), "r": int(r), "p": int(p), "maxmem": 256 * 2**20}  # bytes; werkzeug's default takes 32 MiB
    derive = partial(hashlib.scrypt, salt=salt.encode(), **costs)
    return ParsedHash(f"scrypt:{n}:{r}:{p}", 0, derive, bytes.fromhex(digest))


# werkzeug's two formats and Django's, with the salt as text. The bounds keep a bad row from taking minutes.
HASH_FORMATS = [
    (r"pbkdf2:(sha1|sha256|sha512):([1-9][0-9]{0,6})\$([^$]+)\$((?:[0-9a-f]{2})+)", parse_pbkdf2),
    (r"scrypt:([1-9][0-9]{0,6}):([1-9][0-9]?):([1-9])\$([^$]+)\$([0-9a-f]{128})", parse_scrypt),
    (r"pbkdf2_(sha256)\$([1-9][0-9]{0,6})\$([^$]+)\$([A-Za-z0-9+/]{43}=)", parse_pbkdf2),
]


def parse_hash(stored):
    """Return the ParsedHash of a string, or None if its format is unknown."""
    for pattern, parse in HASH_FORMATS if isinstance(stored, str) else ():
        if match := re.fullmatch(pattern, stored):
            with contextlib.suppress(ValueError):  # a salt that is not Unicode, or a cost that is too high
                return parse(*match.groups())
    return None


def hash_password(password, iterations=Settings.pbkdf2_iterations):
    """Return `pbkdf2:sha256:ITERATIONS$SALT$HEX` for a string (RFC 8018, 5.2)."""
    salt = secrets.token_hex(16)
    digest = hashlib.pbkdf2_hmac("sha256", password.encode(), salt.encode(), iterations)
    return f"pbkdf2:sha256:{iterations}${salt}${digest.hex()}"


def verify_password(stored, password, iterations=0):
    """Return whether the password matches a stored hash, after the work of at least `iterations` of PBKDF2-SHA256."""
    # So the time does not tell an unknown user (None), or an old cheap hash, from a wrong password.
    secret, parsed, matches = password.encode("utf-8", "surrogatepass"), parse_hash(stored), False
    start = time.thread_time()
    with contextlib.suppress(ValueError):  # costs that scrypt refuses
        matches = parsed is not None and hmac.compare_digest(parsed.derive(secret), parsed.digest)
    rest = iterations - (parsed.iterations if parsed else 0)
    if parsed and parsed.method != "pbkdf2:sha256":  # its worth in iterations is unknown: time an eighth to compare
        middle, eighth = time.thread_time(), iterations // 8
        hashlib.pbkdf2_hmac("sha256", secret, b"spent", eighth or 1)
        rest = eighth * (7 - (middle - start) / max(time.thread_time() - middle, 1e-9))  # an eighth is done already
    if rest >= 1:
        hashlib.pbkdf2_hmac("sha256", secret, b"spent", int(rest))
    return matches


def needs_rehash(stored, iterations):
    """Return whether a hash has another format than hash_password's, or fewer `iterations`."""
    parsed = parse_hash(stored)
    return not (parsed and stored.startswith("pbkdf2:sha256:") and parsed.iterations >= iterations)


# --- Store ---
# Users, sessions and throttle buckets, in SQLite or MySQL. The user table of Flask-JWT's tutorial is used as it is: no
# unique index, NULLs, collations that find ROY for roy. So Python checks values before SQL, usernames after it.

BATCH_SIZE = 400  # rows per statement: SQLite takes 999 values, and a packet is limited as well
DISABLED_PREFIX = "!"  # before a hash, as `passwd -l` writes it: no password matches, and removing it restores the hash


@dataclasses.dataclass(frozen=True)
class User:
    id: int
    username: str
    password_hash: str = dataclasses.field(repr=False)
    roles: str = ""  # in alphabetical order, with blanks between

    @functools.cached_property
    def role_set(self):
        return frozenset(self.roles.split())

    @property
    def is_disabled(self):
        return (self.password_hash or "").startswith(DISABLED_PREFIX)


@dataclasses.dataclass(frozen=True)
class Session:
    """One login on one device (kind "login"), or one named API token ("api"). Times are whole seconds since 1970."""

    id: str  # 128 random bits
    user_id: int
    kind: str
    label: str  # the API token's name, or the User-Agent of the login
    ip_address: str
    created_at: int
    last_used_at: int  # to the minute
    expires_at: int
    refresh_counter: int  # counts the refresh tokens of the session, from 1; 0 for an API token
    refreshed_at: int
    kid: str  # of the key that made the current refresh token or API token
    roles: str = ""  # that an API token asked for; a login has those of its user
    read_only: int = 0  # 1 for an API token that is good for GET and HEAD alone


SESSION = ", ".join(field.name for field in dataclasses.fields(Session))  # columns, in the order of the fields
USER = "u.id, u.username, u.password, COALESCE(a.roles, '')"  # columns, in the order of User's fields
USERS = f"SELECT {USER} FROM user u LEFT JOIN auth_user a ON a.user_id = u.id"
COLUMNS = {"user": ["id"], "auth_user": ["roles"], "auth_session": ["roles", "read_only"], "auth_bucket": ["id"]}


def transaction(method):
    """Run a method of Store in a transaction. It gets `run(sql, *values)` before its other arguments."""

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        return self._transact(lambda run: method(self, run, *args, **kwargs))

    return wrapper


class Store:
    """Users, sessions and throttle buckets. Every method raises Unavailable when the database fails."""

    problems = staticmethod(tuple)  # of the hosts, for `doctor`: SQLite has none, MySQLStore looks for some
    select_row, parse_row = "{}", staticmethod(list)  # MySQL reads a session as one JSON value, which is faster
    for_update = ""  # SQL that locks the selected rows until the transaction ends
    repeatable = set()  # kinds of errors that prove a rollback, so that the work may run again

    def __init__(self, database, session_cache_ttl=0):
        self.database, self._cache_ttl, self._last_commit = database, session_cache_ttl, object()
        self._pool = []  # idle connections; a new list when they are closed
        self._wal = None  # SQLite's WalHeader; None until a session is read, False if the file cannot be mapped
        self._cache = None, None  # (version, read_session with a cache)
        self._failing = {}  # {"read" or "write": time of the last failure}
        self._exclusive, self._lock = contextlib.nullcontext(), threading.Lock()
        OPEN_STORES.add(self)

    @staticmethod
    def open(settings, must_exist=False):
        """Return the Store of settings.database, not connected yet. Raises ConfigError if a needed file is missing."""
        database = parse_database(settings.database)
        if must_exist and database.scheme == "sqlite" and not os.path.exists(database.name):
            raise ConfigError(f"{database} does not exist; --database or AUTH_DATABASE names another")
        return (SQLiteStore if database.scheme == "sqlite" else MySQLStore)(database, settings.session_cache_ttl)

    def create_tables(self):
        """Create missing tables and columns. Raises ConfigError."""
        try:
            if self.missing_tables():
                for sql in re.sub("--.*", "", SCHEMA.read_text("utf-8")).split(";")[:-1]:
                    self._transact(lambda run, sql=sql: run(sql))
                self._add_columns()
            self._read(f"{USERS} LIMIT 1")
            self._read(f"SELECT {SESSION} FROM auth_session LIMIT 1")
        except (OSError, Unavailable) as failure:
            self.close()
            raise ConfigError(self.advice(failure) if failure.__cause__ else failure) from None

    def _add_columns(self):
        """Add the two columns that auth_session did not have in version 0.2."""
        for column in ("roles VARCHAR(1024) NOT NULL DEFAULT ''", "read_only BIGINT NOT NULL DEFAULT 0"):
            name = ("auth_session", column.partition(" ")[0])
            try:
                if name not in self._read(self.list_columns):
                    self._transact(lambda run, column=column: run(f"ALTER TABLE auth_session ADD COLUMN {column}"))
            except Unavailable:
                if name not in self._read(self.list_columns):  # else another process was faster
                    raise

    def missing_tables(self):
        """Return the names of the tables that are missing, or lack one of COLUMNS."""
        found = self._read(self.list_columns)
        return [table for table, names in COLUMNS.items() if any((table, name) not in found for name in names)]

    def advice(self, failure):
        return f"{self.database}: {failure.__cause__.args[-1]}; {self.hint}"

    def close(self):
        """Close the idle connections. Others are closed after their use."""
        pool, self._pool = self._pool, []
        while pool:
            with contextlib.suppress(IndexError):  # another thread took the last one
                pool.pop().close()

    def find_user(self, username):
        """Return the User of exactly this username, or None. Raises Conflict if there are several."""
        try:
            return self._exact_match(username, self._read(f"{USERS} WHERE u.username = ?", username))
        except BadRequest:  # the column cannot store these characters
            return None

    def get_user(self, user_id):
        rows = self._read(f"{USERS} WHERE u.id = ?", user_id)
        return User(*rows[0]) if rows else None

    def iter_users(self):
        """Yield all Users by id. They are read in batches, because there may be a million."""
        last_id = -1
        while rows := self._read(f"{USERS} WHERE u.id > ? ORDER BY u.id LIMIT {BATCH_SIZE}", last_id):
            yield from (User(*row) for row in rows)
            last_id = rows[-1][0]

    @transaction
    def add_user(self, run, username, password_hash):
        """Add a user and return the id. Raises Conflict if the username is taken, BadRequest if it does not fit."""
        rows = run(f"{USERS} WHERE u.username = ?{self.for_update}", username).fetchall()
        if self._exact_match(username, rows):
            raise Conflict(f"The user {username!r} exists already")
        user_id = run("INSERT INTO user (username, password) VALUES (?, ?)", username, password_hash).lastrowid
        self._delete_rows_of(run, user_id)  # an old table may use an id again
        return user_id

    @transaction
    def add_users(self, run, users, skip_existing=False):
        """Add a list of (username, password hash, roles), all or none, and return their number. Raises Conflict."""
        rows, existing = [], {name for (name,) in run("SELECT username FROM user" + self.for_update).fetchall()}
        roles_of = {}  # {username: roles} of the new users that have any
        for table in ("auth_session", "auth_user"):  # an old table may use an id again
            run(f"DELETE FROM {table} WHERE user_id NOT IN (SELECT id FROM user)")
        for username, password_hash, roles in users:
            if username not in existing:
                existing.add(username)
                rows.append((username, password_hash))
                roles_of |= {username: roles} if roles else {}
            elif not skip_existing:
                raise Conflict(f"The user {username!r} exists already, or twice in the file; nothing was imported")
        for first in range(0, len(rows), BATCH_SIZE):
            batch = rows[first : first + BATCH_SIZE]
            run(f"INSERT INTO user (username, password) VALUES {marks('(?, ?)', batch)}", *itertools.chain(*batch))
        for user_id, username in run("SELECT id, username FROM user").fetchall() if roles_of else ():
            if username in roles_of:
                run("INSERT INTO auth_user (user_id, roles) VALUES (?, ?)", user_id, roles_of[username])
        return len(rows)

    @transaction
    def set_password(self, run, user, password_hash, keep=None):
        """Replace a User's hash; unless `keep` is None, end all other sessions. False if the stored hash is another."""
        sql = "UPDATE user SET password = ? WHERE id = ? AND COALESCE(password, '') = ?"
        updated = run(sql, password_hash, user.id, user.password_hash or "").rowcount == 1
        if updated and keep is not None:
            run("DELETE FROM auth_session WHERE user_id = ? AND id <> ?", user.id, keep)
        return updated

    @transaction
    def change_roles(self, run, user_id, added, removed):
        """Give roles to a user, take others away, and return all as text. Raises Conflict if the user is gone."""
        rows = run(f"{USERS} WHERE u.id = ?{self.for_update}", user_id).fetchall()
        if not rows:
            raise Conflict("The user was deleted just now")
        roles = join_roles(User(*rows[0]).role_set.union(added).difference(removed))
        run("DELETE FROM auth_user WHERE user_id = ?", user_id)
        run("INSERT INTO auth_user (user_id, roles) VALUES (?, ?)", user_id, roles)
        return roles

    @transaction
    def delete_user(self, run, user_id):
        run("DELETE FROM user WHERE id = ?", user_id)
        self._delete_rows_of(run, user_id)

    @staticmethod
    def _delete_rows_of(run, user_id):
        for table in ("auth_session", "auth_user"):
            run(f"DELETE FROM {table} WHERE user_id = ?", user_id)

    @staticmethod
    def _exact_match(username, rows):
        users = [User(*row) for row in rows if row[1] == username]
        if len(users) > 1:
            ids = ", ".join(str(user.id) for user in users)
            raise Conflict(f"{len(users)} users are named {username!r} (ids {ids}); rename all but one with SQL")
        return users[0] if users else None

    @transaction
    def add_session(self, run, session, password_hash="", creator=None):
        """Store a session. Return False if the user's hash has changed, or the session `creator` has ended."""
        condition, values = "user WHERE id = ? AND password = ?", (session.user_id, password_hash)
        if creator:
            condition, values = "auth_session WHERE id = ? AND user_id = ?", (creator.id, session.user_id)
        columns = dataclasses.astuple(session)
        # one statement: no logout can come between a check and the insert
        sql = f"INSERT INTO auth_session ({SESSION}) SELECT {marks('?', columns)} FROM {condition}"
        return run(sql, *columns, *values).rowcount == 1

    def version(self, now):
        """Return a value that each commit changes, or None: no cache. MySQL notices other processes after the TTL."""
        return (self._last_commit, now // self._cache_ttl) if self._cache_ttl else None

    def get_session(self, sid, now):
        """Return (Session, User), each None if missing. A cached answer serves until the next commit."""
        version = self.version(now)  # before the session is read: a commit in between makes the next request read
        if version is None:
            return self.read_session(sid)
        cache = self._cache
        if cache[0] != version:
            cache = self._cache = version, functools.lru_cache(CACHE_SIZE)(self.read_session)
        return cache[1](sid)

    def read_session(self, sid):
        columns = self.select_row.format("s." + SESSION.replace(", ", ", s.") + ", " + USER)
        joins = "LEFT JOIN user u ON u.id = s.user_id LEFT JOIN auth_user a ON a.user_id = s.user_id"
        rows = self._read(f"SELECT {columns} FROM auth_session s {joins} WHERE s.id = ?", sid)
        if not rows:
            return None, None
        *session, user_id, username, password_hash, roles = self.parse_row(rows[0])
        return Session(*session), None if user_id is None else User(user_id, username, password_hash, roles)

    def list_sessions(self, user_id, now):
        """Return the Sessions of a user that have not expired, newest first."""
        sql = f"SELECT {SESSION} FROM auth_session WHERE user_id = ? AND expires_at > ? ORDER BY created_at DESC, id"
        return [Session(*row) for row in self._read(sql, user_id, int(now))]

    def count_sessions(self, now):
        sql = "SELECT user_id, COUNT(*) FROM auth_session WHERE expires_at > ? GROUP BY user_id"
        return dict(self._read(sql, int(now)))

    @transaction
    def touch_session(self, run, sid, now):
        run("UPDATE auth_session SET last_used_at = ? WHERE id = ? AND last_used_at < ?", int(now), sid, int(now))

    @transaction
    def rotate_refresh_token(self, run, session):
        """Store a session with the next refresh_counter; False if another request did, or the session has ended."""
        columns = ("refresh_counter", "refreshed_at", "kid", "last_used_at", "expires_at")
        sql = f"UPDATE auth_session SET {' = ?, '.join(columns)} = ? WHERE id = ? AND refresh_counter = ?"
        values = [getattr(session, column) for column in columns]
        return run(sql, *values, session.id, session.refresh_counter - 1).rowcount == 1

    @transaction
    def end_sessions(self, run, user_id, sid=None, keep=""):
        """Delete the session `sid` of a user, or all except the one whose id is `keep`. Return their number."""
        if sid is not None:
            return run("DELETE FROM auth_session WHERE id = ? AND user_id = ?", sid, user_id).rowcount
        return run("DELETE FROM auth_session WHERE user_id = ? AND id <> ?", user_id, keep).rowcount

    @transaction
    def update_buckets(self, run, ids, change):
        """Store the dict that change({id: expires_at}) returns. If `change` raises, store nothing."""
        ids = sorted(ids)  # all lock in one order, and make rows first: locks of missing rows deadlock
        run(f"INSERT INTO auth_bucket (id, expires_at) VALUES {marks('(?, 0)', ids)}{self.keep_existing}", *ids)
        sql = f"SELECT id, expires_at FROM auth_bucket WHERE id IN ({marks('?', ids)}) ORDER BY id{self.for_update}"
        for bucket, expires_at in change(dict(run(sql, *ids).fetchall())).items():
            run("UPDATE auth_bucket SET expires_at = ? WHERE id = ?", expires_at, bucket)

    @transaction
    def delete_buckets(self, run, prefix):
        run("DELETE FROM auth_bucket WHERE id >= ? AND id < ?", prefix, prefix + "~")  # ~ is after all letters

    def delete_expired(self, now, limit):
        """Delete at most `limit` expired sessions, and as many buckets."""
        for table in ("auth_session", "auth_bucket"):
            sql = f"SELECT id FROM {table} WHERE expires_at <= ? ORDER BY expires_at LIMIT {limit:d}"
            if ids := sorted(row[0] for row in self._read(sql, int(now))):
                sql = f"DELETE FROM {table} WHERE id IN ({marks('?', ids)}) AND expires_at <= ?"
                self._transact(lambda run, sql=sql, ids=ids: run(sql, *ids, int(now)))

    def _read(self, sql, *values):
        return self._attempt("read", lambda connection: self._execute(connection, sql, *values).fetchall())

    def _transact(self, work):
        def work_and_commit(connection):
            self._execute(connection, self.begin)
            result = work(partial(self._execute, connection))
            try:
                connection.commit()
            except self.driver.Error as error:
                if self._kind_of(error) == "deadlock":
                    raise
                raise self._refusal("write", error) from error  # not repeated: it may have succeeded
            return result

        try:
            return self._attempt("write", work_and_commit)
        finally:
            self._last_commit = object()  # before the answer, so that the next request reads again

    def _attempt(self, kind, work, attempts=10):
        """Return work(connection). Repeat work that was rolled back, as after a deadlock."""
        while True:
            attempts -= 1
            try:
                with self._exclusive, self._connection() as connection:
                    result = work(connection)
            except self.driver.Error as error:
                if not attempts or self._kind_of(error) not in self.repeatable:
                    raise self._refusal(kind, error) from error
                time.sleep(secrets.randbelow(20) / 1000)  # else the same transactions would deadlock again
            else:
                if time.monotonic() > self._failing.get(kind, float("inf")) + 1 and self._failing.pop(kind, 0):
                    log_event("database_recovered", kind=kind)  # after a good second: a flapping database logs little
                return result

    @contextlib.contextmanager
    def _connection(self):
        """A connection from the pool, or a new one. After an exception it is rolled back."""
        pool = self._pool
        try:
            connection = pool.pop()
        except IndexError:
            connection = self._connect()
        try:
            yield connection
        except BaseException as error:
            try:
                connection.rollback()
            except self.driver.Error:
                pool = None
            self._react(connection, error.__cause__ or error)  # the driver's error, not our AuthError
            raise
        finally:
            if pool is self._pool:
                pool.append(connection)
            else:  # the connection has failed, or the pool was closed in the meantime
                connection.close()

    def _refusal(self, kind, error):
        """Return the AuthError for a driver's exception. Log only the first of consecutive failures."""
        if isinstance(error, self.driver.IntegrityError):
            return Conflict("The table refuses this row: the username exists in it, or a column needs another value")
        if self._kind_of(error) == "misfit":
            return BadRequest("The columns of the table are too short, or cannot store these characters")
        if kind not in self._failing:
            log_event("database_error", logging.ERROR, kind=kind, error=str(error))
        self._failing[kind] = time.monotonic()
        return Unavailable()

    def _kind_of(self, error):
        return "misfit" if isinstance(error, self.driver.DataError) else ""

    def _after_fork(self):
        """Leave the parent's connections open and unused: closing one here would end it for the parent."""
        self._inherited = self._pool, self._wal
        self._pool, self._wal, self._cache, self._lock = [], None, (None, None), threading.Lock()


OPEN_STORES = weakref.WeakSet()
os.register_at_fork(after_in_child=lambda: [store._after_fork() for store in OPEN_STORES])
SCHEMA = Path(__file__).with_name("schema.sql")


def join_roles(roles):
    """Return roles as the text of a column. Raises BadRequest if they do not fit."""
    text = " ".join(sorted(roles))
    if len(text) > 1024:
        raise BadRequest("The roles are together longer than 1024 characters")
    return text


def marks(mark, values):
    return ", ".join([mark] * len(values))


class SQLiteStore(Store):
    driver = sqlite3
    begin = "BEGIN IMMEDIATE"
    keep_existing = " ON CONFLICT DO NOTHING"
    list_columns = "SELECT t.name, c.name FROM sqlite_master t, pragma_table_info(t.name) c"
    hint = "file and folder must be writable, with room on the disk; --database or AUTH_DATABASE names another"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._path = os.path.realpath(self.database.name)  # chdir must not change it
        if not self.database.name:  # memory is one connection, used by one thread at a time
            self._path, self._exclusive = ":memory:", threading.Lock()

    def close(self):
        super().close()
        wal, self._wal = self._wal, None
        if wal:
            wal.close()

    def version(self, now):
        wal = self._wal
        if wal is None:
            with self._lock:
                try:
                    wal = self._wal = self._wal or WalHeader(self._connect(), f"{self._path}-shm")
                except (OSError, ValueError):  # memory, or a file system that cannot share memory
                    wal = self._wal = False
                except sqlite3.Error:
                    return None
        return (wal, wal.map[:48], self._last_commit) if wal else None  # wal too: a new index may repeat old bytes

    def _connect(self):
        if self.database.name:  # the hashes are for the owner only; SQLite gives its other files the same mode
            create_private_file(self._path)
        connection = sqlite3.connect(self._path, timeout=5, isolation_level=None, check_same_thread=False)
        try:
            connection.text_factory = partial(str, encoding="utf-8", errors="replace")  # a damaged row must not raise
            enable_wal(connection)
            connection.execute("PRAGMA synchronous = FULL")  # a commit survives a power cut in WAL mode, too
        except BaseException:
            connection.close()
            raise
        return connection

    def _execute(self, connection, sql, *values):
        # AUTOINCREMENT, which MySQL spells differently: a token of a deleted user must not fit the next one
        return connection.execute(sql.replace("/*! AUTO_INCREMENT */", "AUTOINCREMENT"), values)

    def _react(self, connection, error):
        if isinstance(error, sqlite3.Error) and "readonly" in str(error):  # an open connection stays read-only
            self.close()
        if isinstance(error, sqlite3.Error) and "full" in str(error):  # the write-ahead log may fill the disk
            with contextlib.suppress(sqlite3.Error):
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def create_private_file(path):
    """Create a missing file for its owner only. One that root makes belongs to the owner of the folder."""
    with contextlib.suppress(OSError), open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        if os.geteuid() == 0:
            folder = os.stat(os.path.dirname(path))
            os.fchown(file.fileno(), folder.st_uid, folder.st_gid)


def enable_wal(connection):
    """Turn WAL mode on. SQLite does not wait if several processes do this to a new file at once, so wait here."""
    end = time.monotonic() + 5
    while True:
        try:
            return connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
            time.sleep(0.05)


class WalHeader:
    """The header of SQLite's WAL index. It changes with each commit on this host (sqlite.org/walformat.html, 2.1)."""

    # Each file is mapped once, for the life of the process: a process that closes any descriptor of a file loses all
    # its locks on it (POSIX), SQLite's included.
    _maps, _lock = {}, threading.Lock()

    def __init__(self, connection, path):
        connection.execute("SELECT name FROM sqlite_master").fetchall()  # opens the index
        with self._lock:
            for file, (_, descriptor) in [*self._maps.items()]:
                if not os.fstat(descriptor).st_nlink:  # SQLite has removed the file, so it has no locks
                    os.close(self._maps.pop(file)[1])
            status = os.stat(path)
            file = status.st_dev, status.st_ino
            if file not in self._maps:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                self._maps[file] = mmap.mmap(descriptor, 48, access=mmap.ACCESS_READ), descriptor
            self.map = self._maps[file][0]
        self.close = connection.close  # while it is open, SQLite keeps the file


MYSQL_ERRORS = dict.fromkeys((2006, 2013, 1053, 1317, 1927, 4031), "lost")  # the server ended the connection or query
MYSQL_ERRORS |= {1290: "read-only", 1836: "read-only"}  # OPTION_PREVENTS_STATEMENT, READ_ONLY_MODE
MYSQL_ERRORS |= {2003: "down", 1047: "down"}  # CONN_HOST_ERROR; a Galera node without its cluster
MYSQL_ERRORS |= {1213: "deadlock", 1267: "misfit", 3988: "misfit"}  # misfit: text that the column cannot take


class MySQLStore(Store):
    """MySQL or MariaDB through PyMySQL, which is imported only here: it takes 2 MiB."""

    begin = "START TRANSACTION READ WRITE"  # a read-only server refuses it
    select_row, parse_row = "JSON_ARRAY({})", staticmethod(lambda row: json.loads(row[0]))  # PyMySQL: 10 µs per column
    for_update = " FOR UPDATE"
    keep_existing = " ON DUPLICATE KEY UPDATE id = id"
    list_columns = "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = DATABASE()"
    hint = "check AUTH_DATABASE; if only tables or columns are missing, run `server.py init` as an administrator of it"

    def __init__(self, *arguments):
        super().__init__(*arguments)
        import pymysql

        self.driver = pymysql
        self._hosts = [*self.database.hosts]  # those that failed come last
        self.repeatable = {"deadlock", "lost"} | ({"down", "read-only"} if len(self._hosts) > 1 else set())
        self._retry_at = 0.0  # time of the next attempt while no host works, else 0

    def problems(self):
        for host, port in self.database.hosts:
            try:
                with contextlib.closing(self._connect_to(host, port)) as connection:
                    [[read_only]] = self._execute(connection, "SELECT @@read_only").fetchall()
                    [[_, cipher]] = self._execute(connection, "SHOW SESSION STATUS LIKE 'Ssl_cipher'").fetchall()
            except self.driver.Error as error:
                yield f"{host}:{port}: {error.args[-1]}; repair that host, or take it out of AUTH_DATABASE"
                continue
            if str(read_only) not in ("0", "OFF"):
                yield f"{host}:{port} is read-only; make it writable, or take it out of AUTH_DATABASE"
            if not cipher and not is_loopback(host) and "unix_socket" not in self.database.options:
                yield f"{host}:{port} is another host, reached without TLS; add ?ssl_ca=FILE to AUTH_DATABASE"

    def _connect(self):
        """Connect to the first host that works. If all fail, one request per second retries, and the others fail."""
        with self._lock:
            if time.monotonic() < self._retry_at:
                raise self.driver.OperationalError(2003, "No host of AUTH_DATABASE answers")
            if self._retry_at:
                self._retry_at = time.monotonic() + 1
        for host in self._hosts:
            try:
                connection = self._connect_to(*host)
            except self.driver.Error as error:
                failure = error
                self._give_way(host)
            else:
                self._retry_at = 0.0
                return connection
        self._retry_at = 0.0 if self._kind_of(failure) == "lost" else time.monotonic() + 1  # it hung up: no pause
        raise failure

    def _connect_to(self, host, port):
        options = {"host": host, "port": port, "user": self.database.user, "database": self.database.name}
        options |= {"password": self.database.password.encode("utf-8", "surrogateescape"), **self.database.options}
        try:  # without autocommit, reads would keep the snapshot of the first
            connection = self.driver.connect(charset="utf8mb4", autocommit=True, **options)
        except (RuntimeError, OSError, UnicodeError) as error:  # `cryptography` is missing, a certificate is wrong, …
            raise self.driver.OperationalError(0, str(error)) from None
        try:
            self._set_up(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _set_up(self, connection):
        # REPEATABLE READ: else INSERT … SELECT does not lock the row that it reads. Strict mode: else the server cuts
        # long values. A wait for a lock must end before the read timeout, which means that the host is gone.
        seconds = self.database.options["read_timeout"] // 2
        self._execute(connection, "SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        sql = "SET sql_mode = 'STRICT_ALL_TABLES', innodb_lock_wait_timeout = ?, lock_wait_timeout = ?"
        self._execute(connection, sql, seconds, seconds)
        if self._execute(connection, "SHOW VARIABLES LIKE 'wsrep_on'").fetchall() == (("wsrep_on", "ON"),):
            if self._execute(connection, "SHOW STATUS LIKE 'wsrep_ready'").fetchall() != (("wsrep_ready", "ON"),):
                raise self.driver.OperationalError(1047, "This Galera node has lost its cluster")
            self._execute(connection, "SET wsrep_sync_wait = 7")  # see the commits of the other nodes

    def _give_way(self, host):
        self._hosts = sorted(self._hosts, key=lambda other: other == host)  # the others keep their order

    def _execute(self, connection, sql, *values):
        cursor = connection.cursor()
        cursor.execute(sql.replace("?", "%s"), values)
        return cursor

    def _react(self, connection, error):
        kind = self._kind_of(error)
        if kind == "down" and len(self._hosts) == 1:
            self._retry_at = time.monotonic() + 1
        if kind in ("down", "read-only"):
            self._give_way((connection.host, connection.port))
        if kind in ("lost", "down") or (kind == "read-only" and len(self._hosts) > 1):  # a single one still reads
            self.close()

    def _kind_of(self, error):
        if isinstance(error.__context__, TimeoutError):  # PyMySQL reports a silent host with the code of a lost one
            return "down"
        if isinstance(error, self.driver.InterfaceError):
            return "lost"
        return MYSQL_ERRORS.get(error.args[0] if error.args else 0) or super()._kind_of(error)


# --- Keys and tokens ---
# The key set signs and verifies. A token's header only chooses which of our keys is tried. Only access tokens are JWTs;
# refresh tokens and API tokens are opaque, `SID.COUNTER.MAC`. Times are arguments, in seconds since 1970.

MIN_RSA_BITS = 3072
ALGORITHMS = ("HS256", "EdDSA", "ES256", "RS256")
THUMBPRINT_MEMBERS = {"oct": "k kty", "OKP": "crv kty x", "EC": "crv kty x y", "RSA": "e kty n"}  # RFC 7638, 3.2


@dataclasses.dataclass(frozen=True)
class Key:
    kid: str  # the thumbprint (RFC 7638)
    algorithm: str
    signer: jwt.PyJWK = dataclasses.field(repr=False)
    verifier: jwt.PyJWK = dataclasses.field(repr=False)
    public: dict | None  # as a JWK; None for a symmetric key
    secret: bytes = dataclasses.field(repr=False)  # key of the MACs of opaque tokens

    @classmethod
    def from_jwk(cls, jwk):
        """Return the Key of a private JWK (RFC 7517). Raises ConfigError, which never repeats the JWK."""
        try:
            members = {name: jwk[name] for name in THUMBPRINT_MEMBERS[jwk["kty"]].split()}
            private = jwk["k" if jwk["kty"] == "oct" else "d"].encode()
            signer = jwt.PyJWK.from_dict(jwk)
            verifier = jwt.PyJWK.from_dict(members, signer.algorithm_name)  # a private RSA key cannot verify
            signer.Algorithm.sign(b"", signer.Algorithm.prepare_key(signer.key))  # else the first login would fail
        except Exception:  # PyJWT raises many types, and some repeat the key
            raise ConfigError("a key is not a private JSON Web Key (RFC 7517)") from None
        canonical = json.dumps(members, sort_keys=True, separators=(",", ":"))  # RFC 7638, 3
        kid = base64url_encode(hashlib.sha256(canonical.encode()).digest()).decode()
        algorithm = signer.algorithm_name
        operations = jwk.get("key_ops", ["sign"])
        is_for_signing = jwk.get("use", "sig") == "sig" and isinstance(operations, list) and "sign" in operations
        if algorithm not in ALGORITHMS or not is_for_signing:
            raise ConfigError(f"a key is not for signing with one of {', '.join(ALGORITHMS)} (alg, use or key_ops)")
        problem = signer.Algorithm.check_key_length(signer.key)
        if algorithm == "RS256" and signer.key.key_size < MIN_RSA_BITS:
            problem = f"an RSA key has {signer.key.key_size} bits; it needs {MIN_RSA_BITS}"
        if problem:
            raise ConfigError(problem)
        if algorithm == "HS256":
            check_secret(signer.key)
        public = None if jwk["kty"] == "oct" else {"kid": kid, "use": "sig", "alg": algorithm, **members}
        return cls(kid, algorithm, signer, verifier, public, private)

    @classmethod
    def from_secret(cls, secret):
        key = base64url_encode(secret.encode("utf-8", "surrogateescape")).decode()
        return cls.from_jwk({"kty": "oct", "alg": "HS256", "k": key})

    def mac(self, message):
        """Return a MAC of text. The label separates it from the other signatures of the key."""
        return base64url_encode(hmac.digest(self.secret, b"rest-auth\n" + message.encode(), "sha256")).decode()


SESSION_ID = re.compile(r"[A-Za-z0-9_-]{22}")
OPAQUE_TOKEN = re.compile(r"([A-Za-z0-9_-]{22})\.(0|[1-9][0-9]{0,15})\.([A-Za-z0-9_-]{43})")


class KeySet:
    """Keys: the first one signs, all verify. A key file that breaks leaves the keys as they are."""

    def __init__(self, fallback_keys=(), path=""):
        self._fallback_keys = tuple(fallback_keys)  # they verify beside the file's keys, and sign without a file
        self._path, self._version, self._checked_at, self._failure = path, None, 0.0, None
        self._lock = threading.Lock()
        self._use(self._fallback_keys)

    @classmethod
    def load(cls, settings, create=False):
        """Return the keys of the key file, then secret_key. `create` makes a file if there is neither."""
        secret = [Key.from_secret(settings.secret_key)] if settings.secret_key else []
        if create and not secret and not os.path.lexists(settings.key_file):
            with edit_key_file(settings.key_file) as jwks:
                if not jwks:  # another process may have been faster
                    jwks.append(new_jwk("HS256"))
        key_set = cls(secret, os.path.abspath(settings.key_file))  # chdir must not change it
        if not secret or os.path.lexists(settings.key_file):
            key_set._read()
        return key_set

    def public(self, now):
        """Return the JWK Set of the public keys (RFC 7517, 5)."""
        self._reload(now)
        return {"keys": [key.public for key in self.keys if key.public]}

    def signing_key(self, now):
        self._reload(now)
        return self.keys[0]

    def sign(self, claims):
        """Sign a dict of claims and return the JWT (RFC 7519)."""
        key = self.signing_key(claims["iat"])
        return jwt.encode(claims, key.signer, headers={"kid": key.kid}, sort_headers=False)

    def verify(self, token, now, leeway=0):
        """Return the claims of a JWT that is valid at `now`. Raises InvalidToken with PyJWT's text."""
        self._reload(now)
        try:
            claims = self._decode(token)
        except jwt.PyJWTError as error:
            raise InvalidToken(str(error).partition(": ")[0]) from None  # behind the colon it quotes the token
        return check_times(claims, now, leeway)

    def opaque_token(self, session):
        """Return the refresh token or API token of a session. The database alone is not enough to make it."""
        message = f"{session.id}.{session.refresh_counter}"
        return f"{message}.{(self._find(session.kid) or self.keys)[0].mac(message)}"

    def read_opaque_token(self, token, now):
        """Return (session id, counter) of an opaque token that one of the keys made. Raises InvalidToken."""
        self._reload(now)
        match, message = OPAQUE_TOKEN.fullmatch(token), token.rpartition(".")[0]
        for _ in range(2):  # another process may have just rotated the keys
            if match and any(hmac.compare_digest(match[3], key.mac(message)) for key in self.keys):
                return match[1], int(match[2])
            self._reload()
        raise InvalidToken("The token is not from this service")

    def digest(self, text, now):
        """Return a pseudonym of a text for the database, by the last key: `key rotate` does not change that key."""
        self._reload(now)
        return self.keys[-1].mac(f"digest of {text}")[:22]

    def _find(self, kid):
        """Return a tuple of the Key with this kid; () if the file, read again, does not have it."""
        if all(key.kid != kid for key in self.keys):
            self._reload()
        return tuple(key for key in self.keys if key.kid == kid)

    def _decode_uncached(self, token):
        kid = jwt.get_unverified_header(token).get("kid")
        failure = jwt.InvalidSignatureError("Signature verification failed")
        for key in self.keys if kid is None else self._find(kid):
            try:
                return check_types(jwt.decode(token, key.verifier, options=DECODE_OPTIONS))
            except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError) as error:
                failure = error
        raise failure

    def _reload(self, now=None):
        """Read the file again if it has changed; with `now`, check that at most once per second."""
        if now is not None and -1 < now - self._checked_at < 1:
            return
        self._checked_at = now or self._checked_at
        with self._lock:  # a slow reader of an older file must not come last
            version = file_version(self._path)
            is_known_bad = now is None and self._failure and self._failure[0] == version  # left to the check per second
            if not self._path or version == self._version or is_known_bad:
                return
            try:
                self._read()
                log_event("key_rotated", signing_key=self.keys[0].kid, keys=[key.kid for key in self.keys])
            except ConfigError as error:  # tried again with the next check
                if self._failure != (version, str(error)):
                    self._failure = version, str(error)
                    log_event("key_reload_failed", logging.ERROR, error=f"{error}; the keys stay as they are")

    def _read(self):
        version, keys = file_version(self._path), [Key.from_jwk(jwk) for jwk in read_key_file(self._path)]
        kids = {key.kid for key in keys}
        self._use((*keys, *(key for key in self._fallback_keys if key.kid not in kids)))
        self._version, self._failure = version, None

    def _use(self, keys):
        self.keys = keys  # before the cache: what a removed key verified must not get into the new one
        self._decode = functools.lru_cache(CACHE_SIZE)(self._decode_uncached)


def file_version(path):
    """Return a value that changes with the file; None if it is missing."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode
    return None


class RemoteKeySet(jwt.PyJWKClient):
    """The public keys that another host publishes (RFC 7517). They verify access tokens, as a KeySet does."""

    retry_at = 0.0

    def verify(self, token, now, leeway=0):
        """As KeySet.verify. Raises Unavailable if the keys cannot be fetched."""
        try:
            kid = jwt.get_unverified_header(token).get("kid")
            cached = self.jwk_set_cache.get()  # without the lock that get_signing_key holds during a fetch
            key = (cached and self.match_kid(cached.keys, kid)) or self.get_signing_key(kid)
            claims = jwt.decode(token, key, ALGORITHMS[1:], DECODE_OPTIONS)  # a published symmetric key is not secret
        except jwt.PyJWTError as error:
            raise InvalidToken(str(error).partition(": ")[0]) from None  # behind the colon it quotes the token
        return check_times(check_types(claims), now, leeway)

    def fetch_data(self):
        """Fetch the keys, but not within two seconds of a failure: else each request would wait for the issuer."""
        if time.monotonic() >= self.retry_at:
            try:
                return super().fetch_data()
            except Exception as error:  # the answer of another host can raise anything
                self.retry_at = time.monotonic() + 2
                advice = "if the issuer has only HS256 keys, which are not published, run there: key rotate --alg ES256"
                log_event("jwks_error", logging.ERROR, url=self.uri, error=str(error), advice=advice)
        raise Unavailable("The public keys of the issuer cannot be fetched; try again")


# PyJWT checks times by the clock of the machine; check_times does it by `now`.
DECODE_OPTIONS = dict.fromkeys(("verify_exp", "verify_iat", "verify_nbf"), False)
DECODE_OPTIONS["require"] = ["exp", "iat", "nbf", "identity"]


def check_types(claims):
    """Return the claims. Raises InvalidToken unless they have our types. A cached token is checked once."""
    for name in ("exp", "iat", "nbf"):
        if type(claims[name]) not in (int, float) or not 0 <= claims[name] < 2**53:  # refuses NaN as well
            raise InvalidToken(f"The claim {name} must be a number of seconds")
    identity = claims["identity"]
    if type(identity) is not int or not 0 < identity < 2**63:
        raise InvalidToken("The claim identity must be the integer id of a user")
    if claims.get("sub", str(identity)) != str(identity):
        raise InvalidToken("The claims identity and sub name different users")
    if "sid" in claims and not (isinstance(claims["sid"], str) and SESSION_ID.fullmatch(claims["sid"])):
        raise InvalidToken("The claim sid must be the id of a session")
    return claims


def check_times(claims, now, leeway):
    """Return the claims. Raises InvalidToken unless they are valid at `now` (RFC 7519, 4.1.4 to 4.1.6)."""
    if claims["exp"] <= now - leeway:
        raise InvalidToken("Signature has expired")
    for name in ("iat", "nbf"):
        if claims[name] > now + leeway:
            raise InvalidToken(f"The token is not yet valid ({name})")
    return claims


def read_key_file(path):
    """Return the JWKs of a key file. Raises ConfigError if it is missing, malformed or open to others."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), encoding="utf-8") as file:  # a FIFO would block
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            jwks = json.load(file)["keys"]
        kids = {Key.from_jwk(jwk).kid for jwk in jwks}
        if mode & 0o027:
            raise ConfigError(f"open to others (mode {mode:04o}); run: chmod 600 {path}")
        if not jwks or len(kids) < len(jwks):
            raise ConfigError("a key is there twice; delete one of the two" if jwks else "holds no keys; restore it")
        return jwks
    except OSError as error:
        hint = "the service makes it at its first start" if error.errno == errno.ENOENT else "run this as its user"
        problem = f"{error.strerror}; {hint}, or name another with AUTH_KEY_FILE"
    except ConfigError as error:
        problem = error
    except (ValueError, KeyError, TypeError, RecursionError):
        problem = 'not a JWK Set, {"keys": […]}; restore it, or name another file with AUTH_KEY_FILE'
    raise ConfigError(f"key file {path}: {problem}")


@contextlib.contextmanager
def edit_key_file(path):
    """Yield the JWKs of a key file to change, then replace the file, one process at a time. Raises ConfigError."""
    path = os.path.realpath(path)
    with contextlib.ExitStack() as stack:
        try:
            folder = os.open(os.path.dirname(path), os.O_RDONLY)
            stack.callback(os.close, folder)
            fcntl.flock(folder, fcntl.LOCK_EX)
            before = read_key_file(path) if os.path.lexists(path) else []
            jwks = [*before]
            yield jwks
            if jwks == before:  # the file stays, and with it the cache of each process
                return
            draft = f"{path}.draft"
            Path(draft).unlink(missing_ok=True)  # a kill may have left it
            create_private_file(draft)
            with open(draft, "a", encoding="utf-8") as file:  # raises if the file could not be made
                status = os.stat(path if os.path.exists(path) else draft)  # root must not lock the service out
                json.dump({"keys": jwks}, file, indent=1)
                file.flush()
                os.fchown(file.fileno(), status.st_uid, status.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(status.st_mode))
                os.fsync(file.fileno())
            os.replace(draft, path)
            os.fsync(folder)
        except OSError as error:
            raise ConfigError(f"key file {path}: {error.strerror}; AUTH_KEY_FILE or --key-file names another") from None


def new_jwk(algorithm):
    """Return a new private key for one of ALGORITHMS, as a JWK."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    generate = {
        "HS256": partial(secrets.token_bytes, 32),
        "EdDSA": ed25519.Ed25519PrivateKey.generate,
        "ES256": partial(ec.generate_private_key, ec.SECP256R1()),
        "RS256": partial(rsa.generate_private_key, 65537, MIN_RSA_BITS),
    }
    jwk = jwt.get_algorithm_by_name(algorithm).to_jwk(generate[algorithm](), as_dict=True)
    jwk.pop("key_ops", None)  # PyJWT writes it for RSA only
    return {"kid": Key.from_jwk(jwk).kid, "alg": algorithm, **jwk}


def find_jwk(kid, jwks):
    kids = [Key.from_jwk(jwk).kid for jwk in jwks]
    if kid not in kids:
        raise ConfigError(f"there is no key {kid!r}; `key list` shows the keys")
    return kids.index(kid)


# --- Auth service ---
# The rules, without HTTP: passwords become sessions, sessions tokens, tokens identities. Annotated parameters are the
# fields of a request's body.

REFRESH_REUSE_INTERVAL = 60  # seconds; long enough for an outage and a retry
LAST_USED_INTERVAL = 60  # seconds between two writes of last_used_at
CLEANUP_LIMIT = 10  # expired rows deleted with each login; a login adds fewer
API_TTL, API_MAX_TTL = 90 * DAY, 366 * DAY  # seconds that an API token lives: default and maximum
KNOWN_IP_TTL = 30 * DAY  # seconds that an address stays known for a username after a login from it


def charge_buckets(found, limits, now):
    """Charge each bucket of `limits` once and return {id: expires_at}. Raises AuthError (429) if one is full."""
    # The generic cell rate algorithm (ITU-T I.371, A.1): a bucket is the time at which it will be empty.
    # `found` is {id: expires_at}, `limits` is {id: (burst, seconds per charge)}.
    charged, wait = {}, 0
    for bucket, (burst, interval) in limits.items():
        expires_at = min(found.get(bucket, now), now + burst * interval)  # the clock may have been set back
        charged[bucket] = max(expires_at, now) + interval
        wait = max(wait, charged[bucket] - now - burst * interval)
    if wait > 0:
        raise AuthError(f"Too many failed logins; try again in {wait} s", 429, retry_after=wait)
    return charged


class HashLimiter:
    """At most `limit` logins inside, of which `at_once` hold `core` to hash, while the others wait."""

    CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def __init__(self, limit, at_once):
        self.limit, self.logins = limit, 0
        self.on_change = lambda logins: None  # so that a server can add a thread for each
        self.core, self._lock = threading.Semaphore(at_once), threading.Lock()

    def __enter__(self):
        self._count(1)

    def __exit__(self, *_):
        self._count(-1)

    def _count(self, step):
        with self._lock:
            if self.logins + step > self.limit:
                raise Unavailable("Too many logins at once; try again", retry_after=1)
            self.on_change(self.logins + step)
            self.logins += step


# Of the caller. None: not known. `roles` is a frozenset.
Identity = namedtuple("Identity", "id username session roles", defaults=(None, None, frozenset()))


class AuthService:
    """Users, sessions and tokens by the rules. Without a store, only the claims of a token are known."""

    def __init__(self, settings, keys, store=None, roles_claim=None):
        self.settings, self.keys, self.store, self.roles_claim = settings, keys, store, roles_claim
        # A login is charged until it succeeds: login_limit of them at once would refuse the one with the oldest `now`.
        at_once = min(HashLimiter.CORES, max(1, (settings.login_limit or NO_LIMIT) - 1))
        self.limiter = HashLimiter(max(1, settings.threads // 2), at_once)  # run() sets a limit of its own
        self._iterations = settings.pbkdf2_iterations  # cost of each check: that of the most expensive hash seen
        self._touch_after = self.warn_proxy_after = 0.0  # times of the next try; client_address uses the second

    def login(self, username: object, password: object, now, label="", ip_address=""):
        """Open a session and return its tokens. Raises InvalidCredentials, AuthError (429) or Unavailable."""
        if not is_text(username) or not is_text(password):
            raise InvalidCredentials
        with self._throttled(username, ip_address, now):
            for _ in range(3):  # another login may rehash between our reading of the hash and our use of it
                user = self._rehash(self._check_password(username, password), password)
                ttl = min(self.settings.session_idle_timeout, self.settings.session_max_age)
                session = self._new_session(user.id, "login", label, ip_address, now, ttl)
                if self.store.add_session(session, user.password_hash):
                    break
            else:
                raise InvalidCredentials
        log_event("login", user_id=session.user_id, username=username, ip_address=ip_address, session_id=session.id)
        return self._issue_tokens(session, user, now)

    def refresh(self, refresh_token: str, now):
        """Return new tokens for a refresh token. Raises InvalidToken, or AuthError if the user is gone."""
        # Each refresh token is good once. The previous one is answered with the current one for a minute: two tabs, or
        # a lost reply. An older one is a stolen copy, and ends the session (RFC 9700, 4.14.2).
        sid, counter = self.keys.read_opaque_token(refresh_token, now)
        for _ in range(3):  # of several requests at once, one rotates; the others read again
            session, user = self._active(self.store.read_session(sid), now)
            age = int(now) - session.refreshed_at
            if counter == session.refresh_counter > 0:
                latest = session.created_at + self.settings.session_max_age
                expires_at = min(int(now) + self.settings.session_idle_timeout, latest)
                if expires_at <= now:  # the settings are newer than the session
                    raise InvalidToken
                changes = {"refreshed_at": int(now), "last_used_at": int(now), "expires_at": expires_at}
                changes |= {"refresh_counter": counter + 1, "kid": self.keys.signing_key(now).kid}
                rotated = dataclasses.replace(session, **changes)
                if self.store.rotate_refresh_token(rotated):
                    log_event("token_refreshed", user_id=session.user_id, session_id=sid)
                    return self._issue_tokens(rotated, user, now)
            elif counter == session.refresh_counter - 1 and -self.settings.leeway <= age <= REFRESH_REUSE_INTERVAL:
                return self._issue_tokens(session, user, now)
            elif counter < session.refresh_counter:
                self.store.end_sessions(session.user_id, sid)
                log_event("refresh_token_reused", logging.WARNING, user_id=session.user_id, session_id=sid)
                raise InvalidToken
            else:  # an API token, or one that is newer than a restored database
                raise InvalidToken("This is not a refresh token of this service")
        raise Unavailable

    def create_api_token(
        self, identity, now, ip_address, name: str, expires_in: int = API_TTL, roles: list = (), read_only: bool = False
    ):
        """Open a session of kind "api" and return its token as a dict. Raises BadRequest or AuthError (403)."""
        require_login(identity)
        if identity.session is None:
            raise AuthError("This token has no session, because another program issued it; log in", 403)
        check_name("name", name)
        if not 1 <= expires_in <= API_MAX_TTL:
            raise BadRequest(f"expires_in must be a whole number of seconds from 1 to {API_MAX_TTL}")
        roles = check_roles(roles)
        if missing := roles - identity.roles:
            raise Forbidden(f"You do not have the role {min(missing)}", missing)
        session = self._new_session(identity.id, "api", name, ip_address, now, expires_in)
        session = dataclasses.replace(session, roles=join_roles(roles), read_only=int(read_only))
        if not self.store.add_session(session, creator=identity.session):
            raise InvalidToken
        log_event("api_token_created", user_id=identity.id, token_name=name, session_id=session.id)
        token = {"access_token": self.keys.opaque_token(session), "token_type": "Bearer", "expires_in": expires_in}
        return token | {"id": session.id, "name": name, "roles": sorted(roles), "read_only": read_only}

    def authenticate(self, token, now):
        """Return the Identity of an access token or API token, and its claims. Raises AuthError (401)."""
        if OPAQUE_TOKEN.fullmatch(token):
            if token.split(".")[1] != "0":
                raise InvalidToken("A refresh token is for POST /auth/refresh; send the access token here")
            if self.store is None or not isinstance(self.keys, KeySet):
                raise InvalidToken("An API token needs the database and the keys of the service; log in instead")
            claims = {"sid": self.keys.read_opaque_token(token, now)[0]}
        else:
            claims = self.keys.verify(token, now, self.settings.leeway)
        if self.store is None or "sid" not in claims:
            if claims["exp"] - claims["iat"] > self.settings.access_token_ttl:  # it could not be revoked
                raise InvalidToken("A token whose session is not looked up must not live longer than access_token_ttl")
            if self.store is None:
                roles = claims.get(self.roles_claim)  # the issuer's word, as old as the token
                roles = [role for role in roles if isinstance(role, str)] if isinstance(roles, list) else ()
                return Identity(claims["identity"], roles=frozenset(roles)), claims
            user = require_active(self.store.get_user(claims["identity"]))
            return Identity(user.id, user.username, roles=user.role_set), claims
        session, user = self._active(self.store.get_session(claims["sid"], now), now)
        if claims.setdefault("identity", user.id) != user.id:  # an API token has no identity claim
            raise InvalidToken
        if now - session.last_used_at >= LAST_USED_INTERVAL and now >= self._touch_after:
            try:
                self.store.touch_session(session.id, now)
            except Unavailable:  # a database that cannot be written can still be read
                self._touch_after = now + LAST_USED_INTERVAL
        roles = user.role_set
        if session.kind == "api":  # the user may have lost a role since
            roles = roles.intersection(session.roles.split())
        return Identity(user.id, user.username, session, roles), claims

    def logout(self, identity, scope: str = "local"):
        """End the session ("local"), the others ("others") or all ("global"). Raises BadRequest or AuthError (403)."""
        sid = identity.session.id if identity.session else ""
        if scope not in ("local", "others", "global") or (scope == "local" and not sid):
            raise BadRequest("scope must be local, others or global; local needs a token of this service")
        if scope == "local":
            self.store.end_sessions(identity.id, sid)
        else:
            require_login(identity)
            self.store.end_sessions(identity.id, keep=sid if scope == "others" else "")
        log_event("logout", user_id=identity.id, session_id=sid, scope=scope)

    def end_session(self, identity, sid):
        """End one of the caller's sessions. Raises AuthError: 404, or 403 if an API token ends another session."""
        if identity.session and identity.session.id != sid:
            require_login(identity)
        if not SESSION_ID.fullmatch(sid) or not self.store.end_sessions(identity.id, sid):
            raise AuthError("There is no such session", 404)
        log_event("logout", user_id=identity.id, session_id=sid, scope="local")

    def add_user(self, username, password):
        """Add a user and return the id. Raises BadRequest, which names the broken rule, or Conflict."""
        check_name("username", username)
        check_new_password(password, username)
        user_id = self.store.add_user(username, hash_password(password, self.settings.pbkdf2_iterations))
        log_event("user_created", user_id=user_id, username=username)
        return user_id

    def set_password(self, user, password, keep=""):
        """Change a password and end the sessions except the one whose id is `keep`. Raises BadRequest or Conflict."""
        check_new_password(password, user.username)
        prefix = DISABLED_PREFIX if user.is_disabled else ""
        password_hash = prefix + hash_password(password, self.settings.pbkdf2_iterations)
        self._replace_hash("password_changed", user, password_hash, keep)

    def change_password(self, identity, current_password: str, new_password: str, now, ip_address=""):
        """Change the caller's password and end all other sessions. Raises BadRequest, Conflict or AuthError."""
        # A wrong current_password counts as a failed login, so that a stolen token does not help to guess.
        require_login(identity)
        user = require_active(self.store.get_user(identity.id))
        check_new_password(new_password, user.username)
        try:
            with self._throttled(user.username, ip_address, now):
                if not verify_password(user.password_hash, current_password, self._iterations):
                    raise InvalidCredentials
                self.set_password(user, new_password, keep=identity.session.id if identity.session else "")
        except InvalidCredentials:
            raise BadRequest("current_password is not the current password") from None

    def disable(self, user):
        """Refuse a user until enabled again, and end the sessions."""
        if not user.is_disabled:
            self._replace_hash("user_disabled", user, DISABLED_PREFIX + (user.password_hash or ""))

    def enable(self, user):
        """Let a user log in again with the password from before, and forget failed logins."""
        if user.is_disabled:
            self._replace_hash("user_enabled", user, user.password_hash.removeprefix(DISABLED_PREFIX))
        self.store.delete_buckets(f"username:{self.keys.digest(user.username, time.time())}")

    def change_roles(self, user, added, removed):
        """Give roles to a user, take others away, and return all as text. Raises BadRequest or Conflict."""
        roles = self.store.change_roles(user.id, check_roles(added), check_roles(removed))
        log_event("roles_changed", user_id=user.id, username=user.username, roles=roles)
        return roles

    def end_all_sessions(self, user):
        """End all sessions of a user, API tokens included."""
        self.store.end_sessions(user.id)
        log_event("logout", user_id=user.id, session_id="", scope="global")

    def delete_user(self, user):
        """Delete a user and end the sessions."""
        self.store.delete_user(user.id)
        log_event("user_deleted", user_id=user.id, username=user.username)

    @contextlib.contextmanager
    def _throttled(self, username, ip_address, now):
        """Run a password check: charge the buckets first, and refund them on success. Raises AuthError (429)."""
        # A login from an address known for the username is not stopped by failures elsewhere, nor does it add to them.
        digest, network, now = self.keys.digest(username, now), network_of(ip_address), int(now)
        limit = self.settings.login_limit or NO_LIMIT  # below: (burst, seconds per charge); 72 s is 50 per hour
        pair, known = f"username:{digest}@{network}", f"known:{digest}@{network}"
        limits = {pair: (limit, 300), f"address:{network}": (10 * limit, 72), f"username:{digest}": (10 * limit, 72)}

        def charge(found):
            if found.get(known, 0) > now:
                limits.pop(f"username:{digest}", None)
            return charge_buckets(found, limits, now)

        def refund(found):
            return {bucket: found.get(bucket, now) - interval for bucket, (_, interval) in limits.items()}

        def update(change):
            with contextlib.suppress(AuthError):  # the session may be stored: the login goes on
                self.store.update_buckets([*limits, known], change)

        with contextlib.suppress(Unavailable):  # the next login tries again
            self.store.delete_expired(now, CLEANUP_LIMIT)
        with self.limiter, self.limiter.core:
            is_charged = False
            try:
                self.store.update_buckets([*limits, known], charge)
                is_charged = True
                yield
            except AuthError as error:
                if event := {401: "login_failed", 429: "login_throttled"}.get(error.status_code):
                    log_event(event, logging.WARNING, username=username[:255], ip_address=ip_address)
                elif is_charged:  # a failing database must not lock a user out
                    update(refund)
                raise
            update(lambda found: refund(found) | {pair: 0, known: now + KNOWN_IP_TTL})

    def _check_password(self, username, password):
        """Return the User. Raises InvalidCredentials, after the same work for an unknown username."""
        try:
            user = self.store.find_user(username)
        except Conflict as conflict:  # two rows of one username: it is not known which password is right
            log_event("duplicate_username", logging.ERROR, error=str(conflict))
            user = None
        stored = user.password_hash if user else None
        parsed = parse_hash(stored)
        limit = 4 * self.settings.pbkdf2_iterations  # one expensive hash must not slow down all
        if parsed and parsed.iterations <= limit:
            self._iterations = max(self._iterations, parsed.iterations)
        if not verify_password(stored, password, self._iterations):
            raise InvalidCredentials
        return user

    def _rehash(self, user, password):
        """Replace a hash that needs_rehash, if the new one can be stored. Return the User with the stored hash."""
        iterations = self.settings.pbkdf2_iterations
        if not needs_rehash(user.password_hash, iterations):
            return user
        rehashed = dataclasses.replace(user, password_hash=hash_password(password, iterations))
        try:
            return rehashed if self.store.set_password(user, rehashed.password_hash) else user
        except AuthError as error:  # the password was right, and the old hash stays good
            log_event("rehash_failed", logging.WARNING, user_id=user.id, error=str(error))
            return user

    def _new_session(self, user_id, kind, label, ip_address, now, ttl):
        now, sid, counter = int(now), secrets.token_urlsafe(16), 1 if kind == "login" else 0
        kid = self.keys.signing_key(now).kid
        return Session(sid, user_id, kind, label[:255], ip_address[:45], now, now, now + ttl, counter, now, kid)

    def _issue_tokens(self, session, user, now):
        iat, user_id = int(now), session.user_id
        ttl = min(self.settings.access_token_ttl, session.expires_at - iat)
        claims = {"exp": iat + ttl, "iat": iat, "nbf": iat, "identity": user_id, "sub": str(user_id)}
        claims |= {"jti": secrets.token_urlsafe(16), "sid": session.id}
        claims |= {"roles": user.roles.split()} if user.roles else {}
        token = {"access_token": self.keys.sign(claims), "token_type": "Bearer", "expires_in": ttl}
        return token | {"refresh_token": self.keys.opaque_token(session)}

    def _active(self, session_and_user, now):
        """Return a Session and its User. Raises InvalidToken if the session has ended, else as require_active."""
        session, user = session_and_user
        if session is None or session.expires_at <= now:
            raise InvalidToken
        return session, require_active(user)

    def _replace_hash(self, event, user, password_hash, keep=""):
        if not self.store.set_password(user, password_hash, keep):
            raise Conflict(f"The password of {user.username!r} was changed by another process just now; try again")
        log_event(event, user_id=user.id, username=user.username)


def create_service(settings):
    """Return an AuthService. Missing tables and a missing key file are created. Raises ConfigError."""
    store = Store.open(settings)
    store.create_tables()
    if store.database.name:  # a server that forks must not hand connections on
        store.close()
    return AuthService(settings, KeySet.load(settings, create=True), store)


def require_login(identity):
    """Raise AuthError (403) for an API token: it uses the API, and does not decide about the account."""
    if identity.session and identity.session.kind == "api":
        raise AuthError("Only a login can do this, not an API token", 403)


def check_roles(names):
    """Return a role, or a list or tuple of roles, as a frozenset. Raises BadRequest for a name that is not a role."""
    names = names if isinstance(names, (list, tuple, set, frozenset)) else [names]
    for name in names:
        if not (isinstance(name, str) and re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,63}", name)):
            raise BadRequest(f"{name!r} is not a role, which has 1 to 64 of a-z 0-9 . _ - and begins with a-z or 0-9")
    return frozenset(names)


def require_active(user):
    """Return the User. Raises AuthError (401) if the user is gone or disabled."""
    if user is None:
        raise InvalidToken("User does not exist", error="Invalid JWT")
    if user.is_disabled:
        raise InvalidToken
    return user


def network_of(ip_address):
    """Return the part of an address that counts as one client: IPv4, or the /64 network of one IPv6 customer."""
    if not is_address(ip_address):  # such as `localhost` of a unix socket
        return "unknown"
    ip = ipaddress.ip_address(ip_address)
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network((ip.packed, 64), strict=False))


def is_text(value):
    """Return whether a value is a string that is not empty and fits in UTF-8, for SQL and hashlib."""
    return isinstance(value, str) and value != "" and not re.search("[\ud800-\udfff]", value)


def check_name(field, value):
    """Raise BadRequest unless a value is text of 1 to 255 characters, none of them control characters."""
    if not is_text(value) or len(value) > 255 or re.search("[\x00-\x1f\x7f-\x9f]", value) or value != value.strip():
        raise BadRequest(f"{field} must have 1 to 255 characters, no control characters, no white space at the ends")


COMMON_PASSWORDS = """password password1 password123 passw0rd p@ssw0rd 12345678 123456789 1234567890 11111111 87654321
    qwertyuiop qwerty123 1q2w3e4r 1qaz2wsx abcd1234 iloveyou sunshine princess football letmein1 changeme""".split()


def check_new_password(password, username):
    """Raise BadRequest for a new password that breaks a rule (after NIST SP 800-63B, 5.1.1.2)."""
    if not is_text(password) or not 8 <= len(password) <= 1024:
        raise BadRequest("A password must have 8 to 1024 characters")
    if password.casefold() == username.casefold():
        raise BadRequest("A password must not be the username")
    if password.casefold() in COMMON_PASSWORDS:
        raise BadRequest("This password is one of the most common, which attackers try first")


# --- Plugin ---
# Closed by default: a route is protected unless its declaration says public=True. An attribute of the function would
# not do, because a decorator in between loses it.


class JWTPlugin:
    """Bottle plugin: app.install(JWTPlugin(secret_key=…)) protects every route that does not say public=True.

    Keywords are fields of Settings. With `database`, each request looks up its session; without, a token is accepted
    until it expires. `jwks_url` takes published keys. A handler with a parameter `identity` or `claims` gets it.
    A route with role="admin", or a tuple of roles, is for users who have one of them. With keys alone, `roles_claim`
    names the claim that holds them. A route with basic=True takes a username and an API token by Basic, too.
    """

    # No `name`: Bottle skips a plugin if a later one has the same name.
    api = 2

    def __init__(self, service=None, jwks_url=None, roles_claim=None, **settings):
        if jwks_url and (settings.get("key_file") or settings.get("secret_key")):
            raise ConfigError("jwks_url replaces key_file and secret_key; leave those out")
        if service is None:
            checked = Settings(**settings)
            keys = RemoteKeySet(jwks_url, timeout=5, cooldown_duration=5) if jwks_url else KeySet.load(checked)
            store = Store.open(checked, must_exist=True) if "database" in settings else None
            service = AuthService(checked, keys, store, roles_claim)
        if not isinstance(service, AuthService):
            raise ConfigError("JWTPlugin takes the settings as keywords: JWTPlugin(key_file=…, database=…)")
        self.service = service

    def setup(self, app):
        if any(isinstance(plugin, JWTPlugin) for plugin in app.plugins):
            raise PluginError("this app has a JWTPlugin already; make_app() installs one")
        add_route = app.add_route

        def add_checked_route(route):
            check_declaration(route)
            add_route(route)

        app.add_route = add_checked_route  # bottle 0.13.4 has no hook for a new route
        app.add_hook("app_reset", partial(self._move_to_front, app))

    def _move_to_front(self, app):
        """Become the outermost plugin after each install(): a cache outside of it would answer without a token."""
        if self in app.plugins:
            app.plugins.remove(self)
            app.plugins.insert(0, self)
            for route in app.routes:
                check_declaration(route)
                route.reset()

    def apply(self, callback, route):
        injected, public, roles = injected_parameters(route), is_public(route), declared_roles(route)
        realm, basic = self.service.settings.realm, route.config.get("basic") is True
        is_mount = "mountpoint.prefix" in route.config

        def wrapper(*args, **kwargs):
            try:
                identity, claims = (None, None) if public else authorize(self.service, request.environ, roles, basic)
                if is_mount:  # keys alone tell no username
                    set_remote_user(request.environ, identity if self.service.store else None)
                if injected:
                    found = {"identity": identity, "claims": json.loads(json.dumps(claims))}  # not the cached ones
                    kwargs |= {name: found[name] for name in injected}
                result = callback(*args, **kwargs)
            except AuthError as error:
                result = error
            if isinstance(result, AuthError):  # raised, or caught by Bottle's JSON plugin
                # git and WebDAV wait for a Basic challenge; a browser would ask for a password, which is refused
                result.add_challenges(realm, basic and "HTTP_SEC_FETCH_MODE" not in request.environ)
            return result

        return wrapper

    def close(self):
        if self.service.store:
            self.service.store.close()


ANYONE = object()  # the default of `role`; None may come from a setting that is not there, and must not open the app


class JWTMiddleware:
    """Protect any WSGI app: app = JWTMiddleware(app, Settings.load(), public=["/static/"], role="admin").

    The app finds the username in environ["REMOTE_USER"], and the Identity in environ["auth.identity"]. The paths in
    `public` are open; one that ends with a slash, except "/", also opens all below it. `role` is as in JWTPlugin.
    Raises ConfigError, and BadRequest for a wrong role.
    """

    def __init__(self, app, settings, public=(), role=ANYONE):
        if isinstance(public, str) or not all(path.startswith("/") for path in public):
            raise ConfigError('public is a list of paths that begin with a slash, such as ["/static/"]')
        self.app, self.public = app, frozenset(public)
        self.roles = frozenset() if role is ANYONE else demanded_roles(role)
        self.service = AuthService(settings, KeySet.load(settings), Store.open(settings, must_exist=True))

    def __call__(self, environ, start_response):
        try:
            is_public = self._is_public(environ.get("PATH_INFO", ""))
            set_remote_user(environ, None if is_public else authorize(self.service, environ, self.roles)[0])
        except AuthError as error:
            error.add_challenges(self.service.settings.realm)
            start_response(error.status_line, error.headerlist)
            return [b"" if environ["REQUEST_METHOD"] == "HEAD" else error.body.encode()]
        return self.app(environ, start_response)

    def _is_public(self, path):
        below = any(path.startswith(folder) for folder in self.public if folder.endswith("/") and folder != "/")
        # the app may resolve dots, empty parts or backslashes to a path that is not public
        return path in self.public or (below and not re.search(r"//|/\.{1,2}(/|$)|\\", path))


def set_remote_user(environ, identity):
    """Tell an app behind us who calls, in place of what others have said. Raises BadRequest for an odd username."""
    for name in ("REMOTE_USER", "HTTP_REMOTE_USER", "HTTP_REMOTE_GROUPS", "auth.identity"):
        environ.pop(name, None)
    if identity:
        check_name("username", identity.username)  # an old table may hold one with line ends
        environ |= {"REMOTE_USER": identity.username, "auth.identity": identity}


def authorize(service, environ, roles=(), basic=False):
    """Return the Identity and the claims of a WSGI request that has one of the roles. Raises AuthError or Forbidden."""
    token, username = read_authorization(environ.get("HTTP_AUTHORIZATION", ""), basic)
    identity, claims = service.authenticate(token, time.time())
    if username is not None and username != identity.username:
        raise InvalidToken("This API token is not of this username")
    check_access(identity, roles, environ["REQUEST_METHOD"])
    return identity, claims


def check_access(identity, roles, method):
    """Raise Forbidden unless an Identity may use the method, and has one of the roles. No roles: none is needed."""
    if identity.session and identity.session.read_only and method not in ("GET", "HEAD"):
        raise Forbidden("This API token is good for GET and HEAD only")
    if roles and identity.roles.isdisjoint(roles):
        raise Forbidden(f"This needs the role {' or '.join(sorted(roles))}", roles)


def check_declaration(route):
    """Raise PluginError for a route that JWTPlugin would not protect, or whose keywords conflict."""
    where, injected, roles = f"{route.method} {route.rule}", injected_parameters(route), declared_roles(route)
    plugin = next((plugin for plugin in route.all_plugins() if isinstance(plugin, JWTPlugin)), None)
    if is_public(route) and (injected or roles):
        names = " and no ".join([*injected, *(["role"] if roles else [])])
        raise PluginError(f"{where} is public, so it has no {names}; remove one or the other")
    if not is_public(route) and plugin is None:
        raise PluginError(f"{where} would skip JWTPlugin; if that is intended, say public=True")
    if roles and not (plugin.service.store or plugin.service.roles_claim):
        raise PluginError(f"{where} has a role, but JWTPlugin knows none; give it `database` or `roles_claim`")
    if not is_public(route) and re.search(r"[<:](identity|claims)\b", route.rule):
        raise PluginError(f"{where} takes identity or claims from the path; give that part another name")
    own = [name for name, value in route.config.items() if value != route.app.config.get(name) and name != "role"]
    if unknown := [name for name in own if re.search("(?i)^rol|role|group|scope|perm", name)]:
        raise PluginError(f"{where} says {unknown[0]}=, which JWTPlugin does not know; it knows role=")


def injected_parameters(route):
    return {"identity", "claims"} & set(inspect.signature(route.callback).parameters)


def demanded_roles(role):
    """Return a role, or several, as a frozenset. Raises BadRequest, or ConfigError for none: it would let all in."""
    if not (roles := check_roles(role)):
        raise ConfigError("role is empty; name a role, or leave it out")
    return roles


def declared_roles(route):
    """Return the roles of which a route demands one. Raises PluginError unless `role` is a role or a tuple of roles."""
    try:
        return demanded_roles(route.config["role"]) if "role" in route.config else frozenset()
    except (BadRequest, ConfigError) as error:
        raise PluginError(f"{route.method} {route.rule}: {error}") from None


def is_public(route):
    """Return whether the route's own declaration says public=True. With `public` in the app's config, no route is."""
    return route.config.get("public") is True and "public" not in route.app.config


def read_authorization(header, basic=False):
    """Return (token, username) of an Authorization header (RFC 9110, 11.6.2). Without Basic, the username is None."""
    words = [word for word in header.split(" ") if word]  # split() would also split at U+00A0
    if not words:
        raise AuthError("Request does not contain an access token", 401, "Authorization Required")
    scheme = words[0].lower()
    if scheme not in (("jwt", "bearer", "basic") if basic else ("jwt", "bearer")):
        raise AuthError("Unsupported authorization type", 401, "Invalid JWT header")
    if len(words) != 2:
        raise AuthError("Token contains spaces" if words[2:] else "Token missing", 401, "Invalid JWT header")
    return read_basic(words[1]) if scheme == "basic" else (words[1], None)


def read_basic(credentials):
    """Return (API token, username) of Basic credentials (RFC 7617). Raises InvalidToken."""
    try:
        username, _, token = base64.b64decode(credentials, validate=True).decode().partition(":")
    except ValueError:
        token = ""
    if not OPAQUE_TOKEN.fullmatch(token):  # no password is compared here: attackers could guess without a limit
        raise InvalidToken("Basic takes a username and an API token, not a password")
    return token, username


# --- HTTP API ---
# Handlers get their parameters by name; annotated ones are fields of the body. Many are methods of AuthService.

MAX_BODY = 64 * 1024  # bytes; a username and a password need less than 2 KiB


def rest_auth():
    return "You are an authenticate person to see this message"  # the tutorial's words


def me(identity):
    session = identity.session and session_json(identity.session, identity)
    return {"id": identity.id, "username": identity.username, "roles": sorted(identity.roles), "session": session}


def check(identity):
    """Forward-auth: tell a proxy whether a request may pass, and whose it is. The proxy's lines may ask for roles."""
    if unknown := sorted(set(request.query) - {"role"}):  # a misspelt role= would ask for none
        raise BadRequest(f"{unknown[0]!r} is not a parameter; role is the only one")
    names = ("HTTP_X_ORIGINAL_METHOD", "HTTP_X_FORWARDED_METHOD")  # nginx sets the first, Caddy and Traefik the other
    methods = [request.environ[name] for name in names if name in request.environ]
    methods += ["WebSocket"] if "HTTP_SEC_WEBSOCKET_KEY" in request.environ else []
    roles = check_roles(request.query.getall("role"))
    for method in methods or ["unknown"]:  # each must pass: a header that a client adds only narrows
        check_access(identity, roles, method)
    check_name("username", identity.username)  # an old table may hold one that is not safe in a header
    headers = {"Remote-User": identity.username, "Remote-Groups": ",".join(sorted(identity.roles))}
    return HTTPResponse("", 200, headers | {"Cache-Control": "no-store"})  # Bottle sends UTF-8


def list_sessions(service, identity):
    return [session_json(session, identity) for session in service.store.list_sessions(identity.id, time.time())]


def jwks(service):
    body = json.dumps(service.keys.public(time.time())) + "\n"
    return HTTPResponse(body, 200, JSON_HEADERS | {"Cache-Control": "public, max-age=600"})


def health(service):
    service.store.get_user(0)  # a query
    return {"status": "ok"}


def session_json(session, identity):
    names = ("id", "kind", "label", "ip_address", "created_at", "last_used_at", "expires_at")
    is_current = identity.session is not None and session.id == identity.session.id
    limits = {"roles": session.roles.split(), "read_only": bool(session.read_only)} if session.kind == "api" else {}
    return {name: getattr(session, name) for name in names} | limits | {"current": is_current}


def route_callback(service, handler, status=200, strict=False):
    """Make a Bottle callback of a handler. Its result becomes JSON; None becomes 204. `strict`: no other fields."""
    parameters = inspect.signature(handler).parameters
    fields = [parameter for parameter in parameters.values() if parameter.annotation is not parameter.empty]
    supply = {"service": lambda: service, "now": time.time, "ip_address": partial(client_address, service)}
    supply["label"] = partial(request.get_header, "User-Agent", "")
    supplied = [(name, supply[name]) for name in parameters if name in supply]

    @functools.wraps(handler)  # JWTPlugin looks at the parameters
    def callback(**values):
        for name, function in supplied:
            values[name] = function()
        values |= read_fields(fields, strict) if fields else {}
        result = handler(**values)
        if isinstance(result, HTTPResponse):
            return result
        body = "" if result is None else json.dumps(result) + "\n"
        return HTTPResponse(body, 204 if result is None else status, JSON_HEADERS)

    return callback


def client_address(service):
    """Return the client's address: the last one of X-Forwarded-For if the trusted proxy sent it."""
    address = plain_address(request.environ.get("REMOTE_ADDR") or "localhost")  # of a unix socket
    forwarded = request.environ.get("HTTP_X_FORWARDED_FOR")
    if forwarded and address == plain_address(service.settings.trusted_proxy):
        return plain_address(forwarded.rpartition(",")[2])
    if forwarded and time.time() > service.warn_proxy_after:
        service.warn_proxy_after = time.time() + DAY
        log_event("x_forwarded_for_untrusted", logging.WARNING, ip_address=address)
    return address


def plain_address(text):
    """Return an address without brackets and port, and IPv4 without the prefix of mapped IPv6."""
    text = re.sub(r"^\[(.*)\](:\d+)?$|^([\d.]+):\d+$", r"\1\3", text.strip())
    text = re.sub(r"(?i)^::ffff:(\d+(\.\d+){3})$", r"\1", text)
    return str(ipaddress.ip_address(text)) if is_address(text) else text  # one spelling for each IPv6 address


KINDS = {str: "a string", int: "a whole number", bool: "true or false", list: "a list of strings"}
FROM_FORM = {int: to_integer, list: str.split, bool: {"true": True, "false": False}.get}


def read_fields(parameters, strict=False):
    """Return {name: value} of the body's fields, checked by their types. Raises BadRequest or AuthError (413)."""
    body, values = parse_body(), {}
    is_form = media_type().endswith("form-urlencoded")
    if strict and (unknown := [*(body.keys() - {parameter.name for parameter in parameters}), *request.query]):
        raise BadRequest(f"{unknown[0]!r} is not a field of this request's body")
    for parameter in parameters:
        name, kind = parameter.name, parameter.annotation
        value = body.get(name, None if kind is object else parameter.default)
        if value is parameter.empty:
            raise BadRequest(f"{name} is missing")
        if name in body and is_form:  # it has only strings
            value = FROM_FORM.get(kind, str)(value)
        if kind is int and isinstance(value, float) and value.is_integer():  # JSON has one type of number
            value = int(value)
        if kind is not object and name in body and type(value) is not kind:
            raise BadRequest(f"{name} must be {KINDS[kind]}")
        values[name] = value
    return values


def media_type():
    return request.content_type.partition(";")[0].strip()


def parse_body():
    """Return the body as a dict, {} if it is empty. Raises BadRequest or AuthError (413)."""
    body = b""
    if request.content_length <= MAX_BODY:
        is_decoded = request.environ.get("wsgi.input_terminated")  # the server has decoded chunks, so Bottle must not
        body = (request.environ["wsgi.input"] if is_decoded else request.body).read(MAX_BODY + 1)
    content_type = media_type()
    if max(len(body), request.content_length) > MAX_BODY:
        raise AuthError(f"The body is longer than {MAX_BODY} bytes", 413, "Content Too Large")
    if body and content_type not in ("application/json", "application/x-www-form-urlencoded"):
        raise BadRequest("Send application/json or application/x-www-form-urlencoded, and name it in Content-Type")
    try:
        text = body.decode()
        if not content_type.endswith("form-urlencoded"):
            value = json.loads(text or "{}", object_pairs_hook=unique)
        elif text.lstrip().startswith("{"):
            raise BadRequest("The body looks like JSON; send the header Content-Type: application/json with it")
        else:
            value = unique(parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=20))
    except UnicodeDecodeError:
        raise BadRequest("The body is not UTF-8") from None
    except (ValueError, RecursionError):
        raise BadRequest("The body does not match its Content-Type") from None
    if not isinstance(value, dict):
        raise BadRequest("The body is JSON, but not an object")
    return value


def unique(pairs):
    """Return pairs as a dict. Raises BadRequest for a name that is there twice: it is not clear which value counts."""
    if len(dict(pairs)) < len(pairs):
        raise BadRequest("A field is there twice")
    return dict(pairs)


# In place of Bottle's texts, which quote the request.
HTTP_ERRORS = {404: "There is nothing at this path", 405: "See the header Allow", 500: "See the log of the server"}


def bottle_error(error):
    """Return an HTTPError as JSON. An abort() in a handler keeps its text, except a 500; all others get ours."""
    description = HTTP_ERRORS.get(error.status_code, "The request cannot be understood")
    if "bottle.route" in request.environ and error.status_code != 500 and isinstance(error.body, str):
        description = error.body
    response.headers.update(JSON_HEADERS)
    return error_body(error.status_code, error.status_line.partition(" ")[2], description)


def call_wsgi(wsgi, environ, start_response):
    """Call Bottle's WSGI method. Its headers are Latin-1 (PEP 3333), but granian 2.8 encodes them as UTF-8."""

    def start(status, headers, *rest):
        return start_response(status, [(name, value.encode("latin-1").decode()) for name, value in headers], *rest)

    return wsgi(environ, start if environ.get("SERVER_SOFTWARE") == "Granian" else start_response)


def make_app(settings, service=None):
    """Return the service as a Bottle app, to run, mount, merge or add routes to. Raises ConfigError."""
    service = service or create_service(settings)
    app = Bottle()
    app.wsgi = partial(call_wsgi, app.wsgi)
    app.default_error_handler = bottle_error
    app.install(JWTPlugin(service))
    callback = partial(route_callback, service)
    app.post("/auth", callback=callback(service.login), public=True)
    app.post("/auth/refresh", callback=callback(service.refresh), public=True)
    app.post("/auth/logout", callback=callback(service.logout))
    app.get("/auth/me", callback=callback(me))
    app.get("/auth/check", callback=callback(check), basic=True)
    app.put("/auth/password", callback=callback(service.change_password))
    app.get("/auth/sessions", callback=callback(list_sessions))
    app.delete("/auth/sessions/<sid>", callback=callback(service.end_session))
    app.post("/auth/tokens", callback=callback(service.create_api_token, status=201, strict=True))
    app.get("/rest-auth", callback=callback(rest_auth))
    app.get("/.well-known/jwks.json", callback=callback(jwks), public=True)
    app.get("/health", callback=callback(health), public=True)
    return app


# --- Server ---
# waitress 3.0.2 with settings for an open network, and draining: a stop answers all requests that have come.

DRAIN_TIMEOUT = 20  # seconds that running requests have to end after SIGTERM
DRAIN_QUIET = 0.5  # seconds without a request after which draining ends
MAX_LOGINS = HashLimiter.CORES + 64  # working or waiting; a few seconds' work


class StrictParser(HTTPRequestParser):
    """waitress's parser, which also refuses two lengths of one body: request smuggling (RFC 9112, 6.1)."""

    def parse_header(self, header_plus):
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # a Content-Length of 5,000 digits, or a path such as //[
            raise ParsingError("The request cannot be parsed") from error
        encodings = re.findall(rb"\ntransfer[-_]encoding[ \t]*:[ \t]*(.*?)[ \t]*\r", header_plus.lower() + b"\r")
        if encodings and (encodings != [b"chunked"] or self.version != "1.1" or "CONTENT_LENGTH" in self.headers):
            raise ParsingError("The request has an ambiguous length")
        host = self.headers.get("HOST", "" if self.version == "1.0" else ",")  # "," is refused: none, or two joined
        if self.version not in ("1.0", "1.1") or "," in host:
            raise ParsingError("The request has an unknown version, no host, or two")
        if self.adj.draining:
            self.headers["CONNECTION"] = "close"
        if not self.chunked and not self.content_length:
            self.expect_continue = False  # waitress 3.0.2 would wait for a body


WAITRESS_OPTIONS = {  # waitress's defaults are for an inner network
    "asyncore_use_poll": True,  # select() ends the process at the 1,024th descriptor
    "channel_timeout": 30,  # seconds of silence before a connection is closed
    "cleanup_interval": 5,  # seconds between two looks for silent connections
    "max_request_header_size": 16 * 1024,  # bytes; a token signed with RSA takes 1 KiB
    "max_request_body_size": 2**20,  # bytes; a body up to here is read, so that the client can read our 413
    "ident": None,
    "clear_untrusted_proxy_headers": False,  # client_address reads them
}


def run(app, service, on_ready):
    """Serve until SIGINT or SIGTERM, then drain. on_ready(url) is called when the port is open. Raises ConfigError."""
    threads, options = service.settings.threads, WAITRESS_OPTIONS | {"connection_limit": connection_limit()}
    server = waitress.create_server(app, sockets=[listen(service.settings)], threads=threads, **options)
    HTTPChannel.parser_class, server.adj.draining = StrictParser, False
    server.adj.send_bytes = 16 * 1024  # header and body in one system call; deprecated as an option of waitress
    service.limiter.limit = MAX_LOGINS
    service.limiter.on_change = lambda logins: server.task_dispatcher.set_thread_count(threads + logins)

    def stop(*_):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # the second signal ends the process
        server.adj.draining = True
        server.pull_trigger()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    address = server.socket.getsockname()  # a path, or a tuple of host, port and more
    host = f"[{address[0]}]" if server.socket.family == socket.AF_INET6 else address[0]  # unused for a path
    on_ready(f"unix:{address}" if isinstance(address, str) else f"http://{host}:{address[1]}")
    while not server.adj.draining:
        waitress.wasyncore.loop(timeout=1, use_poll=True, map=server._map, count=1)
    drain(server)


def drain(server):
    """Answer the clients that have connected, with `Connection: close`, until all is quiet or DRAIN_TIMEOUT is over."""
    connected = -1
    while connected != len(server.active_channels):  # the kernel would reset connections that are not accepted
        connected = len(server.active_channels)
        server.handle_accept()
    waitress.wasyncore.dispatcher.close(server)  # server.close() would also close the trigger
    end = time.monotonic() + DRAIN_TIMEOUT
    quiet_until = time.monotonic() + DRAIN_QUIET
    while time.monotonic() < min(end, quiet_until):
        waitress.wasyncore.loop(timeout=0.1, use_poll=True, map=server._map, count=1)
        channels = [channel for channel in server.active_channels.values() if channel.connected]
        if any(channel.requests or channel.request or channel.total_outbufs_len for channel in channels):
            quiet_until = time.monotonic() + DRAIN_QUIET
    server.task_dispatcher.shutdown(timeout=1)
    waitress.wasyncore.close_all(server._map)


def listen(settings):
    """Return the listening socket: systemd's (sd_listen_fds(3)), a unix socket, or TCP. Raises ConfigError."""
    host = settings.host
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        return socket.socket(fileno=3)
    try:
        if not host.startswith("/"):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            return socket.create_server((host, settings.port), family=family)
        with socket.socket(socket.AF_UNIX) as probe:
            if Path(host).is_socket() and probe.connect_ex(host) == errno.ECONNREFUSED:  # its process has ended
                os.unlink(host)
        listener = socket.create_server(host, family=socket.AF_UNIX)
        os.chmod(host, 0o660)  # for the group of the proxy
        return listener
    except OSError as error:
        reason = error.strerror.partition(" (")[0] if error.errno else "path too long"  # without "(while … address …)"
        where = host if host.startswith("/") else f"{host} port {settings.port}"
        raise ConfigError(f"{where}: {reason}; choose another with --host or --port") from None


def connection_limit(wanted=4096, reserved=100):
    """Return how many connections to accept. Without a free descriptor, accept() would fail in a busy loop."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted + reserved if hard == resource.RLIM_INFINITY else min(wanted + reserved, hard)
    if limit < 2 * reserved:
        raise ConfigError(f"this process may open {limit} files; it needs {2 * reserved}: raise ulimit -n")
    if soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit - reserved


def set_up_logging():
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # our lines are JSON, those of libraries text
    log.setLevel(logging.INFO)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it logs every request that waits


CONFIGURED_APPS, APP_LOCK = [], threading.Lock()


def app(environ, start_response):
    """The WSGI app for granian, gunicorn, uWSGI and mod_wsgi: `granian --interface wsgi server:app`."""
    with APP_LOCK:  # not at the import: a program that imports JWTPlugin needs no AUTH_ variables
        if not CONFIGURED_APPS:
            set_up_logging()
            CONFIGURED_APPS.append(make_app(Settings.load()))
    return CONFIGURED_APPS[0](environ, start_response)


# --- Command line ---
# The only section that prints, prompts and exits. Each command is a function, with its help as docstring, in COMMANDS.

DEMO_HELP = """\
Log in as roy, then open the tutorial's protected route:
  TOKEN=$(curl -s -d username=roy -d password=roy {url}/auth | cut -d'"' -f4)
  curl -H "Authorization: Bearer $TOKEN" {url}/rest-auth
"""


def serve(settings, args):
    """Serve until SIGTERM or Ctrl-C; the default command. Missing tables and keys are created."""
    if args.demo:
        if "database" in args or "key_file" in args:
            raise ConfigError("--demo keeps users and keys in memory; leave --database and --key-file out")
        if not is_loopback(settings.host):  # roy's password is published
            raise ConfigError(f"--demo serves loopback only, not {settings.host}; leave --host and AUTH_HOST out")
        key, no_file = secrets.token_urlsafe(32), os.path.join(os.devnull, "keys")
        settings = dataclasses.replace(settings, database="sqlite://", secret_key=key, key_file=no_file)
    service = create_service(settings)
    with contextlib.closing(service.store):
        if args.demo:
            service.store.add_user("roy", hash_password("roy", settings.pbkdf2_iterations))
        key, place = service.keys.signing_key(time.time()), "memory" if args.demo else "AUTH_SECRET_KEY"
        place = settings.key_file if os.path.lexists(settings.key_file) else place
        facts = f"users in {service.store.database}, {key.algorithm} key in {place}"

        def on_ready(url):
            print(f"rest-auth {__version__} on {url}, {facts}")
            print(DEMO_HELP.format(url=url) if args.demo else "", end="", flush=True)

        set_up_logging()
        args.run(make_app(settings, service), service, on_ready)


def user_add(service, args):
    """Add a user; the password comes from a prompt or from standard input."""
    service.add_user(args.name, read_password())
    print(f"user {args.name} added to {service.store.database}")


def user_passwd(service, user):
    """Change a password, from a prompt or standard input, and end the sessions. A disabled user stays disabled."""
    service.set_password(user, read_password())


def user_roles(service, user, changes):
    """Give roles with +ROLE, take them away with -ROLE, and show those that the user has then."""
    if wrong := [change for change in changes if not re.match("[+]|-[^-]", change) or change == "-h"]:
        raise BadRequest(f"{wrong[0]!r} is not +ROLE or -ROLE; other flags stand before NAME; nothing was changed")
    added, removed = ([change[1:] for change in changes if change[0] == sign] for sign in "+-")
    if both := {*added} & {*removed}:
        raise BadRequest(f"+{min(both)} and -{min(both)} contradict each other; nothing was changed")
    return (service.change_roles(user, added, removed) if changes else user.roles) or "no roles"


def user_list(service, args):
    """List the users: id, username, method of the password hash, number of sessions, roles."""
    sessions = service.store.count_sessions(time.time())
    for user in service.store.iter_users():
        parsed, name = parse_hash(user.password_hash), user.username or "(no name)"
        method = f"{parsed.method}:{parsed.iterations}".removesuffix(":0") if parsed else "no usable hash"
        state = "disabled" if user.is_disabled else method
        name = name if name.isprintable() else ascii(name)
        print(user.id, name, state, sessions.get(user.id, 0), *user.roles.split(), sep="\t")


def user_export(service, args):
    """Write the users with a usable hash, and all disabled ones, with their roles, one JSON object per line."""
    for user in service.store.iter_users():
        if user.username and (user.is_disabled or parse_hash(user.password_hash)):
            roles = {"roles": user.roles.split()} if user.roles else {}
            print(json.dumps({"username": user.username, "password_hash": user.password_hash} | roles))
        else:
            print(f"user {user.id} ({user.username!r}) cannot log in, and is left out", file=sys.stderr)


def user_import(service, args):
    """Add the users of an export, from standard input: all, or none if one cannot be added."""
    if sys.stdin.isatty():
        raise BadRequest("Give the export on standard input: user import < FILE")
    users = [read_exported(line, number) for number, line in enumerate(sys.stdin, 1) if line.strip()]
    if not users:
        raise BadRequest("Standard input holds no users; nothing was imported")
    count = service.store.add_users(users, args.skip_existing)
    log_event("users_imported", number=count)
    skipped = f", {len(users) - count} skipped because they exist" if args.skip_existing else ""
    print(f"{count} users imported into {service.store.database}{skipped}")


def read_exported(line, number):
    """Return (username, password hash, roles) of a line. Raises BadRequest, which does not repeat the hash."""
    try:
        user = json.loads(line.removeprefix("\ufeff"))  # some editors put this mark there
        username, password_hash, roles = user["username"], str(user["password_hash"]), user.get("roles", [])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise BadRequest(f'Line {number} is not {{"username": …, "password_hash": …}}; nothing was imported') from None
    is_usable = password_hash.startswith(DISABLED_PREFIX) or parse_hash(password_hash)
    if not is_text(username) or len(username) > 255 or not is_usable:
        raise BadRequest(f"Line {number}: {username!r} is no username, or its hash is unknown; nothing was imported")
    try:
        return username, password_hash, join_roles(check_roles(roles))
    except BadRequest as error:
        raise BadRequest(f"Line {number}: {error}; nothing was imported") from None


def read_password():
    """Ask for a password twice at a terminal, else read the first line of standard input; never an argument."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    password = getpass.getpass("New password: ")
    if getpass.getpass("Again: ") != password:
        raise BadRequest("The two passwords differ; nothing was changed")
    return password


def key_list(settings, args):
    """List the keys: kid, algorithm, use, place."""
    secret = Key.from_secret(settings.secret_key).kid if settings.secret_key else ""
    for number, key in enumerate(KeySet.load(settings).keys):
        use, place = "verifies" if number else "signs", "AUTH_SECRET_KEY" if key.kid == secret else settings.key_file
        print(key.kid, key.algorithm, use, place, sep="\t")


def key_rotate(settings, args, position=0):
    """Add a new key, which signs from now on; the others still verify."""
    with edit_key_file(settings.key_file) as jwks:
        if position and not jwks:
            raise ConfigError("there is no key file yet; run `key rotate`")
        jwk = new_jwk(args.alg or (Key.from_jwk(jwks[0]).algorithm if jwks else "HS256"))
        jwks.insert(position, jwk)
    print_keys(f"{Key.from_jwk(jwk).kid} added", jwks, settings)


def key_add(settings, args):
    """Add a new key that only verifies until `key promote`, so that other hosts can get it first."""
    key_rotate(settings, args, position=1)


def key_promote(settings, args):
    """Let a key of the file sign from now on; the others still verify."""
    with edit_key_file(settings.key_file) as jwks:
        jwks.insert(0, jwks.pop(find_jwk(args.kid, jwks)))
    print_keys(f"{args.kid} promoted", jwks, settings)


def key_remove(settings, args):
    """Remove a key: everything that it signed, refresh tokens included, is refused from now on."""
    if settings.secret_key and args.kid == Key.from_secret(settings.secret_key).kid:
        raise ConfigError("this key is AUTH_SECRET_KEY; to remove it, unset the variable and restart the service")
    with edit_key_file(settings.key_file) as jwks:
        del jwks[find_jwk(args.kid, jwks)]
        if not jwks:
            raise ConfigError(f"{args.kid} is the last key; run `key rotate` first")
    print_keys(f"{args.kid} removed", jwks, settings)


def print_keys(change, jwks, settings):
    key = Key.from_jwk(jwks[0])
    print(f"{change}; {key.kid} signs, with {key.algorithm}, from {settings.key_file}")


def init(settings, args):
    """Create the missing tables."""
    with contextlib.closing(Store.open(settings)) as store:
        store.create_tables()
        print(f"tables are ready in {store.database}")


def doctor(settings, args):
    """Print what is wrong with this installation and how to fix it; exit status 1 if anything is."""
    with contextlib.closing(Store.open(settings, must_exist=True)) as store:
        problems, path = [*store.problems()], store.database.name
        if store.database.scheme == "sqlite" and os.path.exists(path) and os.stat(path).st_mode & 0o007:
            problems.append(f"{path} is open to others; run: chmod 600 {path}")
        try:
            if settings.secret_key or os.path.lexists(settings.key_file):  # else the first start makes the file
                KeySet.load(settings)
        except ConfigError as error:
            problems.append(str(error))
        try:
            missing = store.missing_tables()
            problems += [f"{store.database}: no table {table}, or an old one; run: server.py init" for table in missing]
            if not {"user", "auth_user"} & {*missing}:
                problems += doctor_users(store.iter_users())
        except Unavailable as failure:
            problems.append(store.advice(failure))
        print(*problems or [f"all is well with {store.database}"], sep="\n")
        return int(bool(problems))


def doctor_users(users):
    ids = {}
    for user in users:
        ids.setdefault(user.username, []).append(str(user.id))
        if not user.is_disabled and not parse_hash(user.password_hash):
            yield f"user {user.id} ({user.username!r}) has no usable hash; `user passwd` sets one"
    for username, same in ids.items():
        if not username or len(same) > 1:
            yield f"the username {username!r} cannot log in (ids {', '.join(same)}); rename its rows with SQL"


ALL_SETTINGS = [field.name for field in dataclasses.fields(Settings)]
NAME, KID = ("name", {"metavar": "NAME"}), ("kid", {"metavar": "KID"})
ALG = ("--alg", {"choices": ALGORITHMS, "help": "(default: that of the key that signs now)"})
SKIP = ("--skip-existing", {"action": "store_true", "help": "skip users that exist; else one stops the import"})
CHANGES = ("changes", {"nargs": "...", "metavar": "+ROLE|-ROLE"})  # the rest: -ROLE is not a flag
DEMO = ("--demo", {"action": "store_true", "help": "serve from memory, with user roy and password roy"})
COMMANDS = [  # command, function, the settings that are its flags, its other arguments
    ("serve", serve, ALL_SETTINGS, [DEMO]),
    ("init", init, ["database"], []),
    ("doctor", doctor, ALL_SETTINGS, []),
    ("user add", user_add, ["database", "pbkdf2_iterations"], [NAME]),
    ("user passwd", user_passwd, ["database", "pbkdf2_iterations"], [NAME]),
    ("user list", user_list, ["database"], []),
    ("user export", user_export, ["database"], []),
    ("user import", user_import, ["database"], [SKIP]),
    ("user roles", user_roles, ["database"], [NAME, CHANGES]),
    ("user logout", AuthService.end_all_sessions, ["database"], [NAME]),
    ("user disable", AuthService.disable, ["database"], [NAME]),
    ("user enable", AuthService.enable, ["database", "key_file"], [NAME]),
    ("user remove", AuthService.delete_user, ["database"], [NAME]),
    ("key list", key_list, ["key_file"], []),
    ("key rotate", key_rotate, ["key_file"], [ALG]),
    ("key add", key_add, ["key_file"], [ALG]),
    ("key promote", key_promote, ["key_file"], [KID]),
    ("key remove", key_remove, ["key_file"], [KID]),
]
EPILOG = "The secret has no flag: all users can read arguments. Exit status: 0 good, 1 failed, 2 wrong usage."


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, which repeat no values, because a value may be a secret."""

    def error(self, message):
        text = re.sub(r"(unrecognized arguments|invalid choice|explicit argument):? .*?(?= \(choose|$)", r"\1", message)
        flags = {word.partition("=")[0] for word in message.split() if word.startswith("--")} - {*text.split()}
        self.exit(2, f"server.py: {' '.join([text, *sorted(flags)])}; see {self.prog} --help\n")  # flags without values


def make_parser():
    parser = Parser(prog="server.py", description=(__doc__ or "").partition("\n")[0], epilog=EPILOG, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"rest-auth {__version__}")
    groups = {"": parser.add_subparsers(title="commands", metavar="COMMAND", required=True)}
    for command, function, settings, arguments in COMMANDS:
        group, _, name = command.rpartition(" ")
        if group not in groups:
            actions = groups[""].add_parser(group, help=f"list and change {group}s")
            groups[group] = actions.add_subparsers(title="actions", metavar="ACTION", required=True)
        texts = {"help": function.__doc__, "description": function.__doc__, "epilog": EPILOG}
        one = groups[group].add_parser(name, allow_abbrev=False, **texts)
        one.set_defaults(command=command, function=function)
        for argument, options in arguments:
            one.add_argument(argument, **options)
        for field in dataclasses.fields(Settings):
            if field.name in settings and field.name != "secret_key":
                text = field.metadata["help"] + (f" (default: {field.default})" if field.default != "" else "")
                flag = "--" + field.name.replace("_", "-")
                one.add_argument(flag, metavar=field.type.__name__, help=text, default=argparse.SUPPRESS)
    return parser


def parse_arguments(words):
    """Return the parsed arguments. Without a command it is `serve`. Raises SystemExit."""
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help", "--version")):
        words = ["serve", *words]
    # one kid in 64 begins with a hyphen
    kids = [word for word in words if words[0] == "key" and re.fullmatch("-[A-Za-z0-9_-]{42}", word)]
    return make_parser().parse_args([word for word in words if word not in kids] + (["--", *kids] if kids else []))


def run_command(args):
    """Call the function of a command with the Settings, or with an AuthService and perhaps a User."""
    flags = {name: value for name, value in vars(args).items() if name in ALL_SETTINGS}
    if "database" in flags and parse_database(flags["database"]).password:
        raise ConfigError("database: every user of this machine can read a flag; put it into AUTH_DATABASE")
    settings = Settings.load(**flags)
    if not args.command.startswith("user"):
        return args.function(settings, args)
    must_exist = args.function not in (user_add, user_import)  # a command in the wrong folder must not make a file
    with contextlib.closing(Store.open(settings, must_exist)) as store:
        store.create_tables()
        keys = KeySet.load(settings) if args.function is AuthService.enable else None  # for the pseudonym in buckets
        service = AuthService(settings, keys, store)
        if "name" not in args or args.function is user_add:
            return args.function(service, args)
        user = store.find_user(args.name) if is_text(args.name) else None
        if user is None:
            raise AuthError(f"There is no user {args.name!r}; `user list` shows all", 404)
        result = args.function(service, user, *([args.changes] if "changes" in args else []))
        return print(f"{args.command} {args.name}: {result or 'done'}")


def main(argv=None, run=run):
    """Run the command line; tests replace `run`. Return the exit status: 0 good, 1 failed, 2 wrong usage."""
    log.addHandler(logging.NullHandler())  # commands print; `serve` sets logging up
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 - it may be closed
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        args.run = run
        status = run_command(args)
        sys.stdout.flush()
        return status or 0
    except SystemExit as exit:
        return exit.code or 0
    except BrokenPipeError:  # the reader, such as `head`, has enough; the flush at exit must not fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ConfigError, AuthError, OSError, UnicodeError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        print(f"server.py: {error}{cause}", file=sys.stderr)
    except (KeyboardInterrupt, EOFError):  # EOFError is Ctrl-D at a prompt
        print("server.py: interrupted", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
