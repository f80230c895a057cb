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

    POST /auth        user name and password for an access token
    GET  /rest-auth   the tutorial's protected route
    GET  /auth/me     who the token says is calling
    GET  /health      200 while the database answers, else 503

The rooms below come in reading order; each uses only those above it.
"""

import argparse
import base64
import contextlib
import dataclasses
import difflib
import getpass
import hashlib
import hmac
import inspect
import ipaddress
import json
import logging
import os
import re
import secrets
import signal
import socket
import sqlite3
import sys
import threading
import time
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import jwt
import pymysql
import waitress
from bottle import Bottle, HTTPResponse, PluginError, request, response
from waitress.channel import HTTPChannel
from waitress.task import ErrorTask

__version__ = "0.1.0"

log = logging.getLogger("auth")


# --- Settings ---
# Every knob once, with its unit and its reason. The field token_ttl is the flag --token-ttl and
# the variable AUTH_TOKEN_TTL. A misspelt or impossible setting stops the start: a door that is
# set up by guesswork is worse than one that does not open.


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
    host: str = setting("127.0.0.1", "address to listen on; beyond loopback put a TLS proxy in front")
    port: int = setting(5000, "port to listen on; 0 takes a free one", (0, 65535))
    secret_key: str = setting(
        "", "HS256 secret, at least 32 bytes; without it the key file is used", shown=False, flag=False
    )
    keys: str = setting("auth.keys", "key file, a private JWK Set; made on first start when there is no secret_key")
    token_ttl: int = setting(300, "seconds an access token lives", (1, 86400))
    leeway: int = setting(10, "seconds that the clocks of two hosts may differ", (0, 300))
    pbkdf2_iterations: int = setting(600_000, "cost of a password hash; OWASP's floor", (1, 9_999_999))
    threads: int = setting(16, "requests worked on at once", (1, 256))
    trusted_proxy: str = setting("", "address of the proxy whose X-Forwarded-For and -Proto are believed")
    realm: str = setting("Login Required", "realm named in a 401")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            check_setting(field, getattr(self, field.name))
        parse_database(self.database)
        if self.secret_key:
            check_secret(self.secret_key)
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


# Secrets that stand in tutorials and manuals: whoever signs with one lets everybody in.
PUBLISHED_SECRETS = {
    "secret-key",
    "super-secret",
    "your-256-bit-secret",
    "a-string-secret-at-least-256-bits-long",
    "a-valid-string-secret-that-is-at-least-512-bits-long-which-is-very-long",
    "09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7",
}
SECRET_MAKER = "python3 -c 'import secrets; print(secrets.token_urlsafe(32))'"


def check_secret(secret):
    """Raise SettingsError for a secret that others know or could guess (RFC 7518, 3.2: 32 bytes for HS256)."""
    if secret in PUBLISHED_SECRETS:
        raise SettingsError(f"secret_key: this one is published; make your own: {SECRET_MAKER}")
    if len(secret.encode("utf-8", "surrogateescape")) < 32:
        raise SettingsError(f"secret_key: shorter than 32 bytes; make a good one: {SECRET_MAKER}")


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


MYSQL_OPTIONS = {
    "unix_socket": str,
    "ssl_ca": str,
    "ssl_cert": str,
    "ssl_key": str,
    "ssl_verify_identity": lambda text: {"true": True, "false": False}[text],
    "connect_timeout": lambda text: max(1, int(text)),
    "read_timeout": lambda text: max(1, int(text)),
    "write_timeout": lambda text: max(1, int(text)),
}


def parse_database(url):
    """Take a database URL apart. Raises SettingsError, which never repeats the URL: it may hold a password."""
    try:
        parts = urlsplit(url)
        if url.startswith("sqlite://"):
            return parse_sqlite(parts)
        if url.startswith("mysql://"):
            return parse_mysql(parts)
    except (ValueError, KeyError) as error:
        why = error if isinstance(error, SettingsError) else f"{type(error).__name__}; write % : @ / ? # as %25 %3A …"
        raise SettingsError(f"database: {why}") from None
    raise SettingsError("database: the URL begins with sqlite:// or mysql://")


def parse_sqlite(parts):
    if parts.netloc or parts.query or parts.fragment:
        raise SettingsError(
            "a SQLite URL has three slashes and a file, or four and an absolute path: sqlite:///auth.db"
        )
    name = unquote(parts.path[1:])
    return Database("sqlite", "" if name == ":memory:" else name)


def parse_mysql(parts):
    userinfo, _, hosts = parts.netloc.rpartition("@")
    user, _, password = userinfo.partition(":")
    name = unquote(parts.path[1:])
    if not user or not name or "/" in name or parts.fragment:
        raise SettingsError("write mysql://USER:PASSWORD@HOST:PORT/NAME, with % : @ / ? # in a password as %25 %3A …")
    pairs = [urlsplit(f"//{host}") for host in hosts.split(",")]
    options = {}
    for option, text in parse_qsl(parts.query, keep_blank_values=True):
        if option not in MYSQL_OPTIONS:
            raise SettingsError(f"no option {option!r}; there are {', '.join(MYSQL_OPTIONS)}")
        options[option] = MYSQL_OPTIONS[option](text)
    if "ssl_ca" in options:  # a named authority is meant to be checked, and the host's name with it
        options.setdefault("ssl_verify_identity", True)
        options["ssl_verify_cert"] = True
    hosts = tuple((pair.hostname or "localhost", pair.port or 3306) for pair in pairs)
    return Database("mysql", name, unquote(user), unquote(password), hosts, options)


# --- Errors ---
# One exception for everything that a client is told. It is Bottle's own response exception, so
# whatever app a route is merged or mounted into sends it as it is; nothing translates it.


def error_body(status, error, description):
    return json.dumps({"status_code": status, "error": error, "description": description}) + "\n"


class AuthError(HTTPResponse):
    """A request is refused; str() of it is the description that the client reads."""

    default_status = 401
    error = "Bad Request"

    def __init__(self, description, **headers):
        self.description = description
        body = error_body(self.default_status, self.error, description)
        super().__init__(body, self.default_status, {"Content-Type": "application/json"}, **headers)

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


class UnknownUser(AuthError):
    """The token is good and its user is gone."""

    error = "Invalid JWT"

    def __init__(self):
        super().__init__("User does not exist")


class NotFound(AuthError):
    """What the request names does not exist."""

    default_status = 404
    error = "Not Found"


class Conflict(AuthError):
    """What the request asks for contradicts what is stored, such as two users of one name."""

    default_status = 409
    error = "Conflict"


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
    costs = {"n": int(n), "r": int(r), "p": int(p), "maxmem": 256 * 2**20}  # bytes; werkzeug's default takes 32 MiB
    return StoredHash("scrypt", 0, partial(hashlib.scrypt, salt=salt.encode(), **costs), bytes.fromhex(digest))


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
            with contextlib.suppress(ValueError):  # a salt that is no Unicode
                return read(*parts.groups())
    return None


def hash_password(password, iterations=Settings.pbkdf2_iterations):
    """Return `pbkdf2:sha256:ITERATIONS$SALT$HEX` for a string (RFC 8018, 5.2)."""
    salt = secrets.token_hex(16)
    digest = hashlib.pbkdf2_hmac("sha256", password.encode(), salt.encode(), iterations)
    return f"pbkdf2:sha256:{iterations}${salt}${digest.hex()}"


def verify_password(stored, password, iterations=0):
    """Is this the password of this stored hash? False for a hash that is malformed, unknown, empty or None.

    At least `iterations` rounds are spent, whatever the hash, so that the time an answer takes does not tell an
    unknown user, a malformed hash or an old cheap one from a wrong password.
    """
    secret = password.encode("utf-8", "surrogatepass")
    hashed = read_hash(stored)
    good = hashed is not None and is_match(hashed, secret)
    rounds = hashed.rounds if hashed else 0
    if rounds < iterations:
        hashlib.pbkdf2_hmac("sha256", secret, b"spent", iterations - rounds)
    return good


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
# Users, in SQLite or MySQL, behind one small surface. The tutorial's table is taken as it is: no
# unique index, columns that may be NULL, collations that find ROY for roy. So names are compared
# in Python after the query, and every value is checked before it.


@dataclasses.dataclass(frozen=True)
class User:
    id: int
    username: str
    password_hash: str = dataclasses.field(repr=False)


class Store:
    """The user table. Every function raises Unavailable when the database fails.

    A connection serves one thread at a time and none is carried over a fork. One that has died is replaced where
    nothing was done on it yet: at the first statement of a read or of a transaction.
    """

    driver = None  # the DB-API module
    begin = ""  # the SQL that starts a transaction
    lock = ""  # the SQL that locks the rows a SELECT finds until the transaction ends
    list_tables = ""

    def __init__(self, database):
        self.database = database
        self._idle = []  # open connections, the last used on top
        self._pid = os.getpid()
        self._alone = contextlib.nullcontext()

    @staticmethod
    def open(url):
        """The store at a database URL; nothing is connected yet. Raises SettingsError."""
        database = parse_database(url)
        return SQLiteStore(database) if database.kind == "sqlite" else MySQLStore(database)

    def prepare(self):
        """Make missing tables. Raises SettingsError where that fails, with the command that does it by hand."""
        script = Path(__file__).with_name("schema.sql")
        try:
            if "user" not in {name for (name,) in self._read(self.list_tables)}:
                for statement in statements(script.read_text("utf-8")):
                    with self.transaction() as run:
                        run(statement)
            self._read("SELECT id, username, password FROM user LIMIT 1")
        except OSError as error:
            raise SettingsError(f"{script}: {error.strerror}; schema.sql belongs beside server.py") from None
        except Unavailable as failure:
            raise SettingsError(self._advice(failure.__cause__, script)) from None

    def close(self):
        """Close the connections that no thread is using."""
        while self._idle:
            self._idle.pop().close()

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
        return [User(*row) for row in self._read("SELECT id, username, password FROM user ORDER BY id")]

    def add_user(self, username, password_hash):
        """Add a user and return the id. Raises Conflict where the name is taken, BadRequest where it does not fit."""
        with self.transaction() as run:
            if self._exactly(username, run(self._by_name + self.lock, username).fetchall()):
                raise Conflict(f"There is a user {username!r} already")
            return run("INSERT INTO user (username, password) VALUES (?, ?)", username, password_hash).lastrowid

    def set_password(self, user, password_hash):
        """Replace a user's hash, unless it was replaced since `user` was read: a newer password is never undone."""
        with self.transaction() as run:
            change = "UPDATE user SET password = ? WHERE id = ? AND COALESCE(password, '') = ?"
            return run(change, password_hash, user.id, user.password_hash or "").rowcount == 1

    def remove_user(self, user_id):
        """Delete a user; True where there was one."""
        with self.transaction() as run:
            return run("DELETE FROM user WHERE id = ?", user_id).rowcount == 1

    def ping(self):
        self._read("SELECT 1")

    _by_name = "SELECT id, username, password FROM user WHERE username = ?"

    @staticmethod
    def _exactly(username, rows):
        users = [User(*row) for row in rows if row[1] == username]
        if len(users) > 1:
            ids = ", ".join(str(user.id) for user in users)
            raise Conflict(f"{len(users)} users are named {username!r} (ids {ids}); rename all but one in the table")
        return users[0] if users else None

    # Connections

    @contextlib.contextmanager
    def transaction(self):
        """`with store.transaction() as run: run(sql, *values)`: commit, or roll back and re-raise."""
        with self._refusals(), self._alone:
            connection, _ = self._first(self.begin)
            try:
                yield partial(self._run, connection)
                connection.commit()
            except BaseException:
                self._roll_back(connection)
                raise
            self._idle.append(connection)

    def _read(self, sql, *values):
        with self._refusals(), self._alone:
            connection, cursor = self._first(sql, *values)
            rows = cursor.fetchall()
            self._idle.append(connection)
            return rows

    def _first(self, sql, *values):
        """Run a first statement on an idle connection, or on a new one where the idle one is dead."""
        while True:
            connection, is_new = self._take()
            try:
                return connection, self._run(connection, sql, *values)
            except BaseException as error:
                connection.close()
                if is_new or not self._is_dead(error):
                    raise
                self.close()  # what killed one has most likely killed all

    def _take(self):
        if self._pid != os.getpid():  # forked: the parent's connections stay open here, unused, or it would lose them
            self._kept_for_parent, self._idle, self._pid = self._idle, [], os.getpid()
        try:
            return self._idle.pop(), False
        except IndexError:
            return self._connect(), True

    def _roll_back(self, connection):
        try:
            connection.rollback()
            self._idle.append(connection)
        except self.driver.Error:
            connection.close()

    @contextlib.contextmanager
    def _refusals(self):
        """Turn the driver's exceptions into ours."""
        try:
            yield
        except self.driver.IntegrityError as error:
            raise Conflict("The table takes that name for the name of another user") from error
        except self.driver.Error as error:
            if self._is_misfit(error):
                raise BadRequest("The table's columns are too short, or cannot write these characters") from error
            log.error("database: %s", error)
            raise Unavailable() from error

    def _is_dead(self, error):
        return False

    def _is_misfit(self, error):
        return isinstance(error, self.driver.DataError)


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

    def __init__(self, database):
        super().__init__(database)
        self._address = Path(database.name).absolute().as_uri()
        if not database.name:  # in memory: a database of this name, alive while one connection is, for one at a time
            self._address = f"file:{secrets.token_hex(8)}?mode=memory&cache=shared"
            self._anchor, self._alone = self._connect(), threading.RLock()

    def close(self):
        super().close()
        if not self.database.name:
            self._anchor.close()

    def _connect(self):
        if self.database.name:  # hashes are for the owner's eyes; SQLite gives its other files the same mode
            with contextlib.suppress(OSError):
                os.close(os.open(self.database.name, os.O_CREAT | os.O_EXCL, 0o600))
        connection = sqlite3.connect(self._address, uri=True, timeout=5, isolation_level=None, check_same_thread=False)
        connection.text_factory = partial(str, encoding="utf-8", errors="replace")  # a damaged row is no exception
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # in WAL mode what survives a power cut
        return connection

    def _run(self, connection, sql, *values):
        # AUTOINCREMENT, which MySQL spells otherwise: a token of a removed user must not fit the next one
        return connection.execute(sql.replace("/*! AUTO_INCREMENT */", "AUTOINCREMENT"), values)

    def _advice(self, error, script):
        return f"{self.database}: {error}; the file and its folder must be writable, or name another database"


class MySQLStore(Store):
    """MySQL or MariaDB through PyMySQL. Error numbers are the servers' own."""

    driver = pymysql
    begin = "START TRANSACTION"
    lock = " FOR UPDATE"
    list_tables = "SELECT table_name FROM information_schema.tables WHERE table_schema = DATABASE()"

    def _connect(self):
        for host, port in self.database.hosts:
            try:
                return self._connect_to(host, port)
            except RuntimeError as error:  # PyMySQL's word for a login that needs `cryptography`, which is missing
                raise pymysql.OperationalError(f"{error}; install PyMySQL[rsa]") from None
            except pymysql.OperationalError as error:
                failure = error
        raise failure

    def _connect_to(self, host, port):
        options = {"connect_timeout": 5, "read_timeout": 10, "write_timeout": 10} | self.database.options  # seconds
        return pymysql.connect(
            host=host,
            port=port,
            user=self.database.user,
            password=self.database.password.encode(),
            database=self.database.name,
            charset="utf8mb4",
            autocommit=True,  # else a read would see the world as of this connection's first read
            sql_mode="STRICT_ALL_TABLES",  # else a value that is too long is cut without a word
            **options,
        )

    def _run(self, connection, sql, *values):
        cursor = connection.cursor()
        cursor.execute(sql.replace("?", "%s"), values)
        return cursor

    def _is_dead(self, error):
        lost = isinstance(error, pymysql.OperationalError) and error.args[0] in (2006, 2013)
        return lost or isinstance(error, pymysql.InterfaceError)

    def _is_misfit(self, error):
        incomparable = error.args[:1] in ((1267,), (3988,))  # a latin1 column and a name in another alphabet
        return incomparable or super()._is_misfit(error)

    def _advice(self, error, script):
        if error.args[:1] in ((1142,), (1044,)):  # may not CREATE
            name, user = self.database.name, self.database.user
            return f"{user} may not make tables; run as one who may: mariadb {name} < {script}"
        return f"{self.database}: {error.args[-1]}"


# --- Tokens ---
# The key set signs and verifies; a token's own header chooses nothing but which of our keys to
# try. Time is an argument everywhere, in seconds since 1970.


@dataclasses.dataclass(frozen=True)
class Key:
    kid: str  # the thumbprint (RFC 7638)
    jwk: jwt.PyJWK = dataclasses.field(repr=False)

    @classmethod
    def from_jwk(cls, jwk):
        """Read one key of a JWK Set (RFC 7517). Raises SettingsError, which never repeats what it read."""
        try:
            key = jwt.PyJWK.from_dict(jwk)
            key.Algorithm.prepare_key(key.key)
        except Exception:  # PyJWT has many words for it, and some of them repeat the key
            raise SettingsError("a key is not a JSON Web Key (RFC 7517)") from None
        if key.algorithm_name != "HS256":
            raise SettingsError(f"a key is for {key.algorithm_name}, not for HS256")
        return cls(thumbprint({"k": jwk["k"], "kty": "oct"}), key)

    @classmethod
    def from_secret(cls, secret):
        k = base64.urlsafe_b64encode(secret.encode("utf-8", "surrogateescape")).rstrip(b"=").decode()
        return cls.from_jwk({"kty": "oct", "alg": "HS256", "k": k})


def thumbprint(members):
    """RFC 7638, 3: the SHA-256 of the key's required members, sorted, without white space."""
    text = json.dumps(members, sort_keys=True, separators=(",", ":"))
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


class KeySet:
    """Keys, newest first: the first one signs, all verify."""

    def __init__(self, keys):
        self.keys = tuple(keys)

    @classmethod
    def load(cls, settings, create=False):
        """The keys that settings name: the secret, or the key file, made first where `create` says so."""
        if settings.secret_key:
            return cls([Key.from_secret(settings.secret_key)])
        if create and not os.path.lexists(settings.keys):
            create_key_file(settings.keys)
        return cls(read_key_file(settings.keys))

    def sign(self, claims):
        """Sign a dict of claims and return the token (RFC 7519)."""
        key = self.keys[0]
        return jwt.encode(claims, key.jwk, headers={"kid": key.kid}, sort_headers=False)

    def verify(self, token, now, leeway=0):
        """Return the claims of a token that is good at `now`. Raises InvalidToken, with PyJWT's text."""
        try:
            claims = self._decode(token)
        except jwt.PyJWTError as error:
            raise InvalidToken(str(error)) from None
        check_claims(claims, now, leeway)
        return claims

    def _decode(self, token):
        kid = jwt.get_unverified_header(token).get("kid")
        failure = jwt.InvalidSignatureError("Signature verification failed")
        for key in self.keys:
            if kid not in (None, key.kid):
                continue
            try:
                return jwt.decode(token, key.jwk, options=DECODE_OPTIONS)
            except (jwt.InvalidSignatureError, jwt.InvalidAlgorithmError) as error:
                failure = error
        raise failure


# PyJWT checks times against the clock of the machine; check_claims does it against `now`.
DECODE_OPTIONS = {
    "require": ["exp", "iat", "nbf", "identity"],
    "verify_exp": False,
    "verify_iat": False,
    "verify_nbf": False,
}


def check_claims(claims, now, leeway):
    """Raise InvalidToken unless the claims are typed as ours are and good at `now` (RFC 7519, 4.1)."""
    for name in ("exp", "iat", "nbf"):
        if type(claims[name]) not in (int, float) or not 0 <= claims[name] < 2**53:  # NaN is not between them either
            raise InvalidToken(f"The claim {name} must be a number of seconds")
    identity = claims["identity"]
    if type(identity) is not int or not 0 < identity < 2**63:
        raise InvalidToken("The claim identity must be the integer id of a user")
    if claims.get("sub", str(identity)) != str(identity):
        raise InvalidToken("The claims identity and sub name different users")
    if claims["exp"] <= now - leeway:
        raise InvalidToken("Signature has expired")
    for name in ("iat", "nbf"):
        if claims[name] > now + leeway:
            raise InvalidToken(f"The token is not yet valid ({name})")


def read_key_file(path):
    """The Keys of a private JWK Set. Raises SettingsError for a file that is open to others or malformed."""
    try:
        with open(path, encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            jwks = json.load(file)["keys"]
    except OSError as error:
        raise SettingsError(f"key file {path}: {error.strerror}; the service needs to read it") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SettingsError(f'key file {path}: not a JWK Set, {{"keys": […]}}; restore it from a backup') from None
    if mode & 0o027 and os.name == "posix":
        raise SettingsError(f"key file {path}: open to others (mode {mode:04o}); run: chmod 600 {path}")
    if not isinstance(jwks, list) or not jwks:
        raise SettingsError(f"key file {path}: holds no keys; restore it from a backup")
    try:
        keys = [Key.from_jwk(jwk) for jwk in jwks]
    except SettingsError as error:
        raise SettingsError(f"key file {path}: {error}") from None
    for key in keys:
        if problem := key.jwk.Algorithm.check_key_length(key.jwk.key):
            raise SettingsError(f"key file {path}: {problem}")
    return keys


def create_key_file(path):
    """Write a new key. Whoever dies halfway leaves no file, whoever comes second leaves the first one's alone."""
    jwk = {"kty": "oct", "alg": "HS256", "k": secrets.token_urlsafe(32)}
    content = json.dumps({"keys": [{**jwk, "kid": Key.from_jwk(jwk).kid}]}, indent=1) + "\n"
    draft = f"{path}.{secrets.token_hex(4)}"
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        finally:
            os.unlink(draft)
    except FileExistsError:
        return
    except OSError as error:
        raise SettingsError(f"key file {path}: cannot be made: {error.strerror}") from None


# --- Sign-in ---
# The rules, without HTTP: who gets a token, and whom a token stands for.


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a handler learns of the caller. Without a database `username` is None: the token does not hold it."""

    id: int
    username: str | None = None


class SignIn:
    """Passwords into tokens, tokens into identities. Without a store, a token's claims are all that is known."""

    def __init__(self, settings, keys, store=None):
        self.settings, self.keys, self.store = settings, keys, store

    def login(self, username, password, now):
        """Return what the client gets for a user name and password. Raises InvalidCredentials."""
        if not is_text(username) or not is_text(password):
            raise InvalidCredentials
        user = self._find(username)
        stored = user.password_hash if user else None
        if not verify_password(stored, password, self.settings.pbkdf2_iterations):
            raise InvalidCredentials
        self._upgrade(user, password)
        return self._issue(user, now)

    def authenticate(self, token, now):
        """Return the Identity that a token stands for, and its claims. Raises InvalidToken or UnknownUser."""
        claims = self.keys.verify(token, now, self.settings.leeway)
        if claims["exp"] - claims["iat"] > self.settings.token_ttl:  # it could not be taken back: promise 3
            raise InvalidToken("A token without a session lives too long")
        if self.store is None:
            return Identity(claims["identity"]), claims
        user = self.store.get_user(claims["identity"])
        if user is None:
            raise UnknownUser
        return Identity(user.id, user.username), claims

    def add_user(self, username, password):
        """Add a user and return the id. Raises BadRequest, which says what is wrong, or Conflict."""
        check_new_username(username)
        check_new_password(password)
        return self.store.add_user(username, hash_password(password, self.settings.pbkdf2_iterations))

    def set_password(self, user, password):
        """Raises BadRequest, or Conflict where somebody else changed it at the same time."""
        check_new_password(password)
        if not self.store.set_password(user, hash_password(password, self.settings.pbkdf2_iterations)):
            raise Conflict(f"The password of {user.username!r} was changed by another just now; look, then try again")

    def close(self):
        if self.store:
            self.store.close()

    def _find(self, username):
        try:
            return self.store.find_user(username)
        except Conflict as conflict:  # two rows of one name: nobody can say whose password it is
            log.error("login refused: %s", conflict)
            return None

    def _upgrade(self, user, password):
        if not needs_rehash(user.password_hash, self.settings.pbkdf2_iterations):
            return
        try:
            self.store.set_password(user, hash_password(password, self.settings.pbkdf2_iterations))
        except AuthError as error:  # the password was right: the login goes on, the old hash stays good
            log.warning("the hash of user %d could not be upgraded: %s", user.id, error)

    def _issue(self, user, now):
        iat, ttl = int(now), self.settings.token_ttl
        claims = {"exp": iat + ttl, "iat": iat, "nbf": iat, "identity": user.id, "sub": str(user.id)}
        claims["jti"] = secrets.token_urlsafe(16)
        return {"access_token": self.keys.sign(claims), "token_type": "Bearer", "expires_in": ttl}


def open_sign_in(settings):
    """A SignIn whose tables and keys are there, made where they were missing. Raises SettingsError."""
    store = Store.open(settings.database)
    try:
        store.prepare()
        return SignIn(settings, KeySet.load(settings, create=True), store)
    except BaseException:
        store.close()
        raise


def is_text(value):
    """A string that is not empty and can be written as UTF-8, so that neither SQL nor hashlib meets another."""
    return isinstance(value, str) and value != "" and not re.search("[\ud800-\udfff]", value)


def check_new_username(username):
    if not is_text(username) or len(username) > 255:
        raise BadRequest("A user name has 1 to 255 characters")
    if username != username.strip() or any(unicodedata.category(c) == "Cc" for c in username):
        raise BadRequest("A user name has no control characters and no white space at its ends")


def check_new_password(password):
    if not is_text(password):
        raise BadRequest("A password has at least one character, all of them Unicode")


# --- Plugin ---
# Closed by default: a route of an app with this plugin is protected unless its declaration says
# public=True. Never by a mark on the function: a decorator in between would open the door.


class JWTPlugin:
    """Bottle plugin: app.install(JWTPlugin(secret_key=…)) protects every route that does not say public=True.

    Keywords are fields of Settings. With `database`, each request looks its user up there; without, what a token claims
    is believed until it expires. A handler that names `identity` or `claims` as a parameter gets it.
    """

    # No `name`: another plugin of the same name would push this one off a route without a word.
    api = 2

    def __init__(self, sign_in=None, **settings):
        if sign_in is None:
            checked = Settings(**settings)
            store = Store.open(checked.database) if "database" in settings else None
            sign_in = SignIn(checked, KeySet.load(checked), store)
        self.sign_in = sign_in

    def setup(self, app):
        """Refuse what would slip past this plugin: a route with skip=…, a mounted app without a plugin of its own."""
        for route in app.routes:
            self._demand_guard(route, app)
        add_route = app.add_route

        def add_guarded_route(route):
            self._demand_guard(route, app)
            add_route(route)

        app.add_route = add_guarded_route  # Bottle itself refuses a second plugin that does this to one app

    def apply(self, callback, route):
        wanted = {"identity", "claims"} & set(inspect.signature(route.callback).parameters)
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

    def _demand_guard(self, route, app):
        guarded = route.app is app or any(isinstance(plugin, JWTPlugin) for plugin in route.app.plugins)
        skipped = any(skip in (True, JWTPlugin, self) for skip in route.skiplist)
        declared = {"identity", "claims"} & set(inspect.signature(route.callback).parameters)
        if is_public(route) and declared:
            raise PluginError(f"{route.method} {route.rule} is public, so it has no {' and no '.join(declared)}")
        if not is_public(route) and (skipped or not guarded):
            raise PluginError(f"{route.method} {route.rule} would skip JWTPlugin; if that is meant, say public=True")


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


def answer(value, status=200, **headers):
    return HTTPResponse(json.dumps(value) + "\n", status, {"Content-Type": "application/json"}, **headers)


def login(sign_in):
    fields = read_fields()
    tokens = sign_in.login(fields.get("username"), fields.get("password"), time.time())
    return answer(tokens, **{"Cache-Control": "no-store"})


def rest_auth():
    return answer("You are an authenticate person to see this message")


def me(identity):
    return answer(dataclasses.asdict(identity))


def health(sign_in):
    sign_in.store.ping()
    return answer({"status": "ok"})


def read_fields():
    """The body, a JSON object or a form, as a dict. Raises BadRequest or PayloadTooLarge."""
    with request.body as file:  # Bottle leaves a long one, which it keeps in a temporary file, open
        body = file.read(MAX_BODY + 1)
    if len(body) > MAX_BODY:
        raise PayloadTooLarge(f"The body is longer than {MAX_BODY} bytes")
    try:
        return PARSERS[request.content_type.partition(";")[0].strip()](body.decode())
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
    return dict(parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=20))


PARSERS = {"application/json": parse_json, "application/x-www-form-urlencoded": parse_form}

# What Bottle and waitress refuse by themselves, in our words: theirs are HTML or plain text, and quote the request.
REFUSALS = {
    400: ("Bad Request", "The request cannot be understood"),
    404: ("Not Found", "There is nothing at this path"),
    405: ("Method Not Allowed", "This path does not take this method; the header Allow says which it takes"),
    413: ("Content Too Large", "The body is too long"),
    431: ("Request Header Fields Too Large", "The header is too long"),
    501: ("Not Implemented", "The body comes in an encoding that is not chunked"),
}
FAILURE = ("Internal Server Error", "The server failed; its log says how")


def bottle_error(error):
    """Bottle's own 4xx and 5xx as JSON; OPTIONS on a known path is no error."""
    status = error.status_code
    if status == 405:
        allowed = error.headers["Allow"].replace("GET", "GET,HEAD") + ",OPTIONS"
        response.set_header("Allow", allowed)
        if request.method == "OPTIONS":
            return HTTPResponse(status=204, headers={"Allow": allowed})
    response.content_type = "application/json"
    return error_body(status, *REFUSALS.get(status, FAILURE))


def make_app(settings, sign_in=None):
    """The whole service as a Bottle app, to run, mount, merge or add routes to; app.close() closes its database.

    Missing tables and a missing key file are made. Raises SettingsError.
    """
    sign_in = sign_in or open_sign_in(settings)
    app = Bottle()
    app.default_error_handler = bottle_error
    app.install(JWTPlugin(sign_in))
    app.post("/auth", callback=partial(login, sign_in), public=True)
    app.get("/rest-auth", callback=rest_auth)
    app.get("/auth/me", callback=me)
    app.get("/health", callback=partial(health, sign_in), public=True)
    return app


# --- Command line ---
# The only room that prints, prompts and ends the process.


class JSONErrorTask(ErrorTask):
    """What waitress refuses by itself, in the shape of our errors and without its name."""

    def execute(self):
        error = self.request.error
        body = error_body(error.code, *REFUSALS.get(error.code, FAILURE)).encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "application/json"))
        self.content_length = len(body)
        self.set_close_on_finish()
        self.write(body)


class JSONChannel(HTTPChannel):
    error_task_class = JSONErrorTask


def serve(app, settings, announce):
    """Serve until SIGINT or SIGTERM; `announce` gets the URL as soon as the port is ours. Raises OSError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.create_server((settings.host, settings.port), family=family) as listener:
        server = waitress.create_server(app, sockets=[listener], **waitress_settings(settings))
        server.channel_class = JSONChannel
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: sys.exit())  # waitress ends its loop at SystemExit
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        with contextlib.suppress(SystemExit):
            announce(f"http://{host}:{listener.getsockname()[1]}")
            server.run()
        server.close()


def waitress_settings(settings):
    """waitress's defaults suit an inner network; these suit an open one."""
    proxy = {"trusted_proxy_count": 1, "trusted_proxy_headers": {"x-forwarded-for", "x-forwarded-proto"}}
    return {
        "threads": settings.threads,
        "connection_limit": connection_limit(),
        "asyncore_use_poll": True,  # select() ends the process at the 1,024th descriptor
        "channel_timeout": 30,  # seconds of silence after which a connection is closed
        "cleanup_interval": 5,  # seconds between two looks for silent ones
        "max_request_header_size": 16 * 1024,  # bytes; a token signed with RSA takes 1 KiB
        "max_request_body_size": 2**20,  # bytes; a body up to here is read, so that the client reads our 413
        "ident": None,
        **(proxy | {"trusted_proxy": settings.trusted_proxy} if settings.trusted_proxy else {}),
    }


def connection_limit(wanted=4096, reserved=100):
    """Connections to hold at once. Past the descriptors of the process accept() would spin on EMFILE."""
    try:
        import resource
    except ImportError:  # Windows
        return 500
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted + reserved if hard == resource.RLIM_INFINITY else min(wanted + reserved, hard)
    if soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return limit - reserved


def serve_command(settings, args):
    """Serve until the end, with what is missing made first."""
    keys = "AUTH_SECRET_KEY" if settings.secret_key else settings.keys
    if args.demo:
        settings, keys = demo_settings(settings), "memory"
    with contextlib.closing(open_sign_in(settings)) as sign_in:
        if args.demo:
            sign_in.store.add_user("roy", hash_password("roy", settings.pbkdf2_iterations))

        def announce(url):
            print(f"rest-auth {__version__} on {url}, users in {sign_in.store.database}, keys in {keys}")
            print(DEMO.format(url=url) if args.demo else "", end="", flush=True)

        try:
            args.serve(make_app(settings, sign_in), settings, announce)
        except OSError as error:
            where = f"{settings.host} port {settings.port}"
            raise SettingsError(f"{where}: {error.strerror}; choose others with --host and --port") from None


DEMO = """\
Sign in as roy, then open the tutorial's protected route:
  TOKEN=$(curl -s -d username=roy -d password=roy {url}/auth | cut -d'"' -f4)
  curl -H "Authorization: Bearer $TOKEN" {url}/rest-auth
"""


def demo_settings(settings):
    """Everything in memory, and on loopback only: the whole world knows roy's password."""
    if settings.host != "localhost" and not is_loopback(settings.host):
        raise SettingsError(f"--demo listens on loopback only, not on {settings.host}; leave --host and AUTH_HOST out")
    return dataclasses.replace(settings, database="sqlite://", secret_key=secrets.token_urlsafe(32))


def is_loopback(host):
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def init_command(settings, args):
    """Make the tables that are missing."""
    with contextlib.closing(Store.open(settings.database)) as store:
        store.prepare()
        print(f"tables are ready in {store.database}")


def user_command(settings, args):
    with contextlib.closing(Store.open(settings.database)) as store:
        store.prepare()
        args.action(SignIn(settings, None, store), args)


def user_add(sign_in, args):
    """Add a user; the password comes from a prompt or from standard input."""
    check_new_username(args.name)
    if sign_in.store.find_user(args.name):
        raise Conflict(f"There is a user {args.name!r} already")
    sign_in.add_user(args.name, new_password())
    print(f"user {args.name} added")


def user_passwd(sign_in, args):
    """Change a user's password; it comes from a prompt or from standard input."""
    user = named_user(sign_in.store, args.name)
    sign_in.set_password(user, new_password())
    print(f"password of {args.name} changed")


def user_list(sign_in, args):
    """List users: id, user name, method of the password hash."""
    for user in sign_in.store.list_users():
        hashed = read_hash(user.password_hash)
        method = f"{hashed.method}:{hashed.rounds}".removesuffix(":0") if hashed else "no usable hash"
        print(f"{user.id}\t{user.username or '(no name)'}\t{method}")


def user_remove(sign_in, args):
    """Remove a user."""
    sign_in.store.remove_user(named_user(sign_in.store, args.name).id)
    print(f"user {args.name} removed")


def named_user(store, name):
    user = store.find_user(name)
    if user is None:
        raise NotFound(f"There is no user {name!r}; `user list` shows who there is")
    return user


def new_password():
    """A password, asked for twice at a terminal, else the first line of standard input: never an argument."""
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    password = getpass.getpass("New password: ")
    if getpass.getpass("Again: ") != password:
        raise BadRequest("The two passwords differ; nothing was changed")
    return password


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def make_parser():
    flags = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    group = flags.add_argument_group("settings", "each is also a variable: --token-ttl is AUTH_TOKEN_TTL")
    for field in dataclasses.fields(Settings):
        if field.metadata["flag"]:
            text = field.metadata["meaning"] + (f" (default: {field.default})" if field.default != "" else "")
            group.add_argument("--" + field.name.replace("_", "-"), metavar=field.type.__name__.upper(), help=text)

    def add(commands, name, run, **defaults):
        command = commands.add_parser(name, parents=[flags], help=run.__doc__, description=run.__doc__)
        command.set_defaults(**defaults)
        return command

    parser = Parser(prog="server.py", parents=[flags], description=__doc__.partition("\n")[0], epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"rest-auth {__version__}")
    parser.add_argument("--demo", action="store_true", help="serve from memory with the user roy, password roy")
    parser.set_defaults(command=serve_command)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    add(commands, "serve", serve_command, command=serve_command)
    add(commands, "init", init_command, command=init_command)
    user = commands.add_parser("user", help="add, change, list and remove users")
    user.set_defaults(command=user_command)
    actions = user.add_subparsers(title="actions", metavar="ACTION", required=True)
    add(actions, "list", user_list, action=user_list)
    for name, action in {"add": user_add, "passwd": user_passwd, "remove": user_remove}.items():
        add(actions, name, action, action=action).add_argument("name", metavar="NAME")
    return parser


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
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it has a line for every request that waits
    try:
        args = make_parser().parse_args(argv, argparse.Namespace(serve=serve))
        args.command(read_settings(args), args)
        return 0
    except SystemExit as stop:
        return stop.code or 0
    except (SettingsError, AuthError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        print(f"server.py: {error}{cause}", file=sys.stderr)
    except KeyboardInterrupt:
        print("server.py: interrupted; nothing was changed", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
