"""Tests of server.py, room by room. Store, service and HTTP tests run on SQLite and on a private MariaDB."""

import ast
import base64
import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import hmac
import http.client
import io
import itertools
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.parse
import warnings
from pathlib import Path
from unittest import mock
from wsgiref import simple_server

import bottle
import jwt
import pymysql
import webtest

import server
from server import ConfigError, Conflict, JWTPlugin, KeySet, Settings, make_app, verify_password

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text("utf-8")
SECRET = "a secret of the tests, which is long enough for HS512 as well: it has 80 bytes.."
NOW = 1_800_000_000  # seconds since 1970, for every test that needs a clock
JSON, URLENCODED = "application/json", "application/x-www-form-urlencoded"
FORM = {"Content_Type": URLENCODED}

# The tutorial's own: its table, its row, its token.
TUTORIAL_HASH = "pbkdf2:sha256:150000$k1Ud5dzh$d0347f416e89ea486b33c988c9be65730329b2dd6d712f73c9920103a006a82e"
TUTORIAL_TABLE = """CREATE TABLE `user` (`id` int(10) unsigned NOT NULL AUTO_INCREMENT, `username` varchar(45) DEFAULT
    NULL, `password` varchar(255) DEFAULT NULL, PRIMARY KEY (`id`)) ENGINE=InnoDB DEFAULT CHARSET=latin1"""


# --- Helpers ---


def wait_for(condition, seconds=30):
    """Return the first true value of condition(); fail when there is none in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {condition}")


def clean_environment():
    return {name: value for name, value in os.environ.items() if not name.startswith("AUTH_")}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def program(*names):
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


class MariaDB:
    """A private MariaDB or MySQL: temporary folder, free port, unprivileged user, root without a password."""

    def __init__(self, *options, first=()):
        """`options` are the server's own, `first` those of its first start."""
        self.folder = tempfile.mkdtemp(prefix="rest-auth-test-")
        self.port, self.socket, self.databases = free_port(), f"{self.folder}/socket", 0
        common = ["--no-defaults", f"--datadir={self.folder}/data"]
        if os.geteuid() == 0:
            shutil.chown(self.folder, "nobody")
            common.append("--user=nobody")
        daemon, install = program("mariadbd", "mysqld"), program("mariadb-install-db")
        make = [daemon, *common, "--initialize-insecure"]
        if install:
            make = [install, *common, "--auth-root-authentication-method=normal", "--skip-test-db"]
        subprocess.run(make, check=True, capture_output=True)
        self.command = [daemon, *common, f"--socket={self.socket}", f"--port={self.port}", "--bind-address=127.0.0.1"]
        self.command += "--innodb-flush-log-at-trx-commit=0 --sql-mode= --transaction-isolation=READ-COMMITTED".split()
        self.command += options
        self.start(*first)

    def start(self, *more):
        with open(f"{self.folder}/log", "ab") as output:
            self.process = subprocess.Popen([*self.command, *more], stdout=output, stderr=output)
        wait_for(self.is_up, 60)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def is_up(self):
        if self.process.poll() is not None:
            raise AssertionError(Path(self.folder, "log").read_text(errors="replace"))
        with contextlib.suppress(OSError, pymysql.Error):
            self.connect().close()
            return True
        return False

    def connect(self, database=None):
        with socket.socket(socket.AF_UNIX) as probe:  # for PyMySQL leaves a socket open that it could not connect
            probe.connect(self.socket)
        return pymysql.connect(unix_socket=self.socket, user="root", database=database, autocommit=True)

    def run(self, sql, *values, database=None):
        with contextlib.closing(self.connect(database)) as connection, connection.cursor() as cursor:
            cursor.execute(sql, values or None)
            return cursor.fetchall()

    def new_database(self):
        self.databases += 1
        self.run(f"CREATE DATABASE t{self.databases} CHARACTER SET latin1")
        return f"t{self.databases}"

    def url(self, database, user="root", password="", **options):
        query = urllib.parse.urlencode(options)
        account = urllib.parse.quote(user) + (":" + urllib.parse.quote(password, safe="") if password else "")
        return f"mysql://{account}@127.0.0.1:{self.port}/{database}" + (f"?{query}" if query else "")

    def stop(self):
        self.process.terminate()
        self.process.wait(30)
        shutil.rmtree(self.folder)


EVENTS = []  # log lines of the current test, as dicts


def setUpModule():
    global mariadb
    mariadb = None
    handler = logging.Handler()
    handler.emit = lambda record: EVENTS.append(json.loads(record.getMessage()))
    server.log.addHandler(handler)
    server.log.setLevel(logging.INFO)
    server.log.propagate = False  # a passing run prints dots only
    os.environ["SSL_CERT_FILE"] = os.devnull  # PyMySQL loads this host's certificates for each connection: 60 ms
    if program("mariadbd", "mysqld"):
        mariadb = MariaDB()
        unittest.addModuleCleanup(mariadb.stop)
    elif os.environ.get("CI"):
        raise AssertionError("no MariaDB here: apt install mariadb-server")


def base64url(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def bearer(token):
    return {"Authorization": f"Bearer {token}"}


class Case(unittest.TestCase):
    """A temporary folder to work in, and settings, service, app and WebTest client made when first asked for."""

    users = ()  # usernames that exist when a test begins

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="rest-auth-test-"))
        self.addCleanup(shutil.rmtree, self.folder)
        EVENTS.clear()
        for username in self.users:
            self.add_user(username)

    @functools.cached_property
    def database(self):
        return f"sqlite:///{self.folder}/auth.db"

    def events(self, name):
        return [event for event in EVENTS if event["event"] == name]

    def with_settings(self, **changes):
        """A service with other settings over the same database."""
        settings = dataclasses.replace(self.settings, **changes)
        return server.AuthService(settings, self.service.keys, self.service.store)

    def new_database(self):
        name = mariadb.new_database()
        self.addCleanup(mariadb.run, f"DROP DATABASE IF EXISTS {name}")
        return name

    def on_each_database(self):
        yield f"sqlite:///{self.folder}/shared.db"
        if mariadb:
            yield mariadb.url(self.new_database())

    def raw_sql(self, sql, *values):
        """Run SQL beside the service, as an operator would, and return its rows."""
        with contextlib.closing(sqlite3.connect(self.folder / "auth.db", isolation_level=None)) as connection:
            return [tuple(row) for row in connection.execute(sql.replace("%s", "?"), values).fetchall()]

    @functools.cached_property
    def settings(self):
        return Settings(database=self.database, secret_key=SECRET, pbkdf2_iterations=1)

    @functools.cached_property
    def service(self):
        service = server.create_service(self.settings)
        self.addCleanup(service.store.close)
        return service

    @property
    def store(self):
        return self.service.store

    @functools.cached_property
    def app(self):
        return make_app(self.settings, self.service)

    @functools.cached_property
    def client(self):
        return webtest.TestApp(self.app)

    def add_user(self, username="alice", password="correct horse"):
        return self.store.add_user(username, server.hash_password(password, 1))

    def login(self, username="alice", password="correct horse"):
        return self.client.post_json("/auth", {"username": username, "password": password}).json["access_token"]

    def get(self, path, token, **options):
        return self.client.get(path, headers=bearer(token), **options)

    def assert_refused(self, answer, status, error, description=None):
        self.assertEqual(answer.status_int, status, answer.text)
        self.assertEqual(answer.content_type, "application/json")
        self.assertEqual(list(answer.json), ["status_code", "error", "description"])
        self.assertEqual((answer.json["status_code"], answer.json["error"]), (status, error))
        if description is not None:
            self.assertEqual(answer.json["description"], description)
        self.assertNotRegex(answer.text, r"Traceback|\.py|SELECT|sqlite|pymysql|sys\.|recursion|codec")

    def token(self, secret=SECRET, **changes):
        """A token without a session, of user 1 and good now, with some claims changed."""
        now = int(time.time())
        return jwt.encode({"exp": now + 300, "iat": now, "nbf": now, "identity": 1} | changes, secret, "HS256")

    # The rules, called with `now`

    def open_session(self, now=NOW, username="alice", **client):
        return self.service.login(username, "correct horse", now, **client)

    def create_api_token(self, tokens, now=NOW, expires_in=86400, **fields):
        return self.service.create_api_token(self.identity(tokens, now), now, "", "backup", expires_in, **fields)

    def change_roles(self, *added, remove=(), username="alice"):
        return self.service.change_roles(self.store.find_user(username), added, remove)

    def refresh(self, tokens, now):
        return self.service.refresh(tokens["refresh_token"], now)

    def identity(self, tokens, now=NOW):
        return self.service.authenticate(tokens["access_token"], now)[0]

    def assert_ended(self, tokens, now=NOW):
        for name, use in {"access_token": self.service.authenticate, "refresh_token": self.service.refresh}.items():
            if name in tokens:
                with self.assertRaisesRegex(server.InvalidToken, "Session has ended"):
                    use(tokens[name], now)

    def sessions(self):
        return self.raw_sql("SELECT id, refresh_counter, last_used_at FROM auth_session ORDER BY id")

    def another_service(self, **changes):
        """A service with a store of its own over the same database, as in another process."""
        service = server.create_service(dataclasses.replace(self.settings, **changes))
        self.addCleanup(service.store.close)
        return service

    # Over HTTP

    def call(self, route, fields=None, token=None, form=False, status=None):
        """One request such as "POST /auth" with the fields as its body; `token` is a dict of tokens."""
        method, path = route.split()
        headers = bearer(token["access_token"]) if token else {}
        if fields is not None:
            headers["Content-Type"] = URLENCODED if form else JSON
        body = "" if fields is None else urllib.parse.urlencode(fields) if form else json.dumps(fields)
        return self.client.request(path, method=method, headers=headers, body=body.encode(), status=status)

    def log_in(self, username="alice", password="correct horse", **options):
        return self.call("POST /auth", {"username": username, "password": password}, **options).json

    def assert_challenged(self, answer, error):
        reason = ', error="invalid_token"' if error in ("Invalid token", "Invalid JWT") else ""
        challenges = ['JWT realm="Login Required"', f'Bearer realm="Login Required"{reason}']
        self.assertEqual(answer.headers.getall("WWW-Authenticate"), challenges)


class MySQLCase(Case):
    def setUp(self):
        if mariadb is None:
            self.skipTest("no MariaDB or MySQL here: apt install mariadb-server")
        self.name = self.new_database()
        self.database = mariadb.url(self.name)
        super().setUp()

    def raw_sql(self, sql, *values):
        return [tuple(row) for row in mariadb.run(sql, *values, database=self.name)]


def on_each_engine(case):
    """Make of a mixin of tests one class for SQLite and one for MySQL."""
    for suffix, base in (("SQLite", Case), ("MySQL", MySQLCase)):
        name = f"{case.__name__}On{suffix}"
        globals()[name] = type(name, (case, base), {"__module__": __name__, "__doc__": case.__doc__})
    return case


class Service:
    """`python server.py` as a process of its own: `with Service(folder, *arguments, **environment) as service`."""

    def __init__(self, folder, *arguments, listener=None, **environment):
        self.errors = open(Path(folder) / "errors", "w+", encoding="utf-8")
        command = [sys.executable, HERE / "server.py", "--port", "0", *arguments]
        if listener:  # as systemd passes one on
            script = f'exec 3<&{listener.fileno()}; export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@"'
            command = ["bash", "-c", script, "bash", *command]
        pass_fds = [listener.fileno()] if listener else []
        environment = clean_environment() | {"AUTH_PBKDF2_ITERATIONS": "1"} | environment
        streams = {"stdout": subprocess.PIPE, "stderr": self.errors, "text": True}
        self.process = subprocess.Popen(command, pass_fds=pass_fds, cwd=folder, env=environment, **streams)

    def __enter__(self):
        self.banner = self.process.stdout.readline()
        found = re.search(r"http://(\S+):(\d+)", self.banner)
        if not found:
            self.__exit__()
            raise AssertionError(f"no start: {self.banner}{self.log}")
        self.address = found[1].strip("[]"), int(found[2])
        return self

    def __exit__(self, *_):
        self.stop(signal.SIGKILL)  # draining takes time; tests of it stop the service themselves
        self.log = self.read_log()
        self.errors.close()
        self.process.stdout.close()

    def stop(self, number):
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(30)

    def read_log(self):
        self.errors.seek(0)
        return self.errors.read()

    def request(self, method, path, body=None, **headers):
        """(status, headers, text) of one request on a connection of its own."""
        connection = http.client.HTTPConnection(*self.address, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read().decode()

    def raw(self, data):
        """All that comes back for these bytes, up to the end of the connection."""
        with socket.create_connection(self.address, timeout=30) as connection:
            with contextlib.suppress(OSError):  # it may refuse, and close, before it has read all
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
            received = b""
            with contextlib.suppress(ConnectionResetError):
                while data := connection.recv(65536):
                    received += data
            return received

    def login(self, username, password):
        body = urllib.parse.urlencode({"username": username, "password": password})
        status, _, text = self.request("POST", "/auth", body, **FORM)
        return json.loads(text)["access_token"] if status == 200 else status


# --- Settings ---


class SettingsTest(unittest.TestCase):
    def test_load_takes_flag_before_variable_before_default(self):
        environ = {"AUTH_ACCESS_TOKEN_TTL": "60", "AUTH_LEEWAY": "", "HOME": "/"}
        found = [Settings.load(environ, **flags).access_token_ttl for flags in ({}, {"access_token_ttl": "90"})]
        self.assertEqual((found, Settings.load(environ).leeway), ([60, 90], Settings.leeway))

    def test_load_wrong_setting_is_refused_with_variable_and_flag(self):
        for name, values, words in [
            ("ACESS_TOKEN_TTL", ["60"], "AUTH_ACESS_TOKEN_TTL is not a setting; .*AUTH_ACCESS_TOKEN_TTL"),
            ("QQQQQQQQQQQQ", [""], "AUTH_QQQQQQQQQQQQ is not a setting; .*AUTH_DATABASE, AUTH_HOST"),
            ("PORT", ["65536", "-1", "5_000", "٥٠٠٠", " 1", "9" * 5000], "AUTH_PORT, --port.* from 0 to 65535"),
            ("REALM", ['a"b', "a\r\nb", "a\\"], "AUTH_REALM, --realm"),
            ("HOST", ["a\0b"], "AUTH_HOST, --host"),
            ("KEY_FILE", ["auth.keys\nAUTH_TRUSTED_PROXY=127.0.0.1'"], "AUTH_KEY_FILE, --key-file"),  # an open quote
            ("TRUSTED_PROXY", ["proxy.example", "cafe", "127.0.0.1/8"], "AUTH_TRUSTED_PROXY, --trusted-proxy"),
            ("DATABASE", ["auth.db"], "AUTH_DATABASE"),
            ("SECRET_KEY", ["secret-key", "x" * 31, "x" * 99, "secret-key" * 4], "secret_key.*secrets.token_urlsafe"),
            ("SECRET_KEY", ["a-string-secret-at-least-256-bits-long"], "known"),
        ]:
            for value in values:
                with self.subTest(name, value=value[:50]), self.assertRaisesRegex(ConfigError, words):
                    Settings.load({f"AUTH_{name}": value})

    def test_settings_value_of_another_type_or_out_of_bounds_is_refused(self):
        for field in dataclasses.fields(Settings):
            wrong = [None, b"x" * 32, 1.0] + (["5", True, -1, 10**10] if field.type is int else [5])
            for value in wrong:
                with self.subTest(field.name, value=value), self.assertRaisesRegex(ConfigError, field.name):
                    Settings(**{field.name: value})
        self.assertRaisesRegex(ConfigError, "AUTH_HOST, --host", Settings, host="")

    def test_secrets_need_not_be_utf8_and_are_not_in_the_repr(self):
        settings = Settings(database="mysql://r:hunter2@db/u", secret_key=os.fsdecode(bytes(range(100, 200))))
        database, key = server.parse_database(settings.database), server.Key.from_secret(settings.secret_key)
        self.assertEqual((database.password, key.signer.key), ("hunter2", bytes(range(100, 200))))
        self.assertNotRegex("".join(map(repr, (settings, database, str(database), key))), "hunter2|defgh")

    def test_is_loopback_takes_addresses_and_not_names_that_look_like_one(self):
        loopback = ["localhost", "127.0.0.1", "127.9.9.9", "::1", "/run/auth.sock"]
        others = ["127.evil.com", "localhost.evil.com", "127.0.0.1.evil.com", "0.0.0.0", "::", "192.0.2.1", ""]
        self.assertEqual([host for host in loopback + others if server.is_loopback(host)], loopback)

    def test_parse_database_returns_the_parts(self):
        times = {"connect_timeout": 5, "read_timeout": 7, "write_timeout": 7}
        for url, text, password, options in [  # str() is the path, or user, hosts and name
            ("sqlite://", "memory", "", {}),
            ("sqlite:///:memory:", "memory", "", {}),
            ("sqlite:///auth.db", os.path.abspath("auth.db"), "", {}),
            ("sqlite:////lib/a%20b.db", "/lib/a b.db", "", {}),
            ("mysql://r%40y:p%2F%3A%25@[::1]:1,b/u", "mysql://r@y@::1:1,b:3306/u", "p/:%", times),
            ("mysql://r@/u?connect_timeout=3", "mysql://r@localhost:3306/u", "", times | {"connect_timeout": 3}),
            ("mysql://r@/u?unix_socket=/s&read_timeout=7", "mysql://r@/s/u", "", times | {"unix_socket": "/s"}),
        ]:
            database = server.parse_database(url)
            self.assertEqual((str(database), database.password, database.options), (text, password, options))
        for query, is_name_checked in [("", True), ("&ssl_verify_identity=false", False)]:
            options = server.parse_database(f"mysql://r@h/u?read_timeout=2&ssl_ca={__file__}{query}").options
            self.assertEqual((options["ssl_verify_cert"], options["ssl_verify_identity"]), (True, is_name_checked))
            self.assertEqual((options["read_timeout"], options["write_timeout"]), (2, 2))

    def test_parse_database_bad_url_is_refused_and_not_repeated(self):
        urls = ["", "hunter2.db", "sqlite:/a", "sqlite://hunter2", "sqlite:///", "sqlite:///a%00b", "sqlite:///a?b"]
        urls += ["postgres://roy:hunter2@db/users", "mysql://:hunter2@db/users", "mysql://r:a@b/c?hunter2@host/db"]
        rests = ["@db", "@db:port/u", "@[db/u", "#4@db/u", "/@db/u", "@db/u/v", "@db/u?ssl=hunter2", "@db/u?ssl_ca="]
        rests += [
            "@db:65536/u",
            "@db/u?ssl_ca=%00",
            "@db/u?read_timeout=1",
            "@db/u?connect_timeout=0",
            "@db/u?ssl_verify_identity=hunter2",
        ]
        rests += [f"@db/u?ssl_cert={__file__}"]  # without ssl_ca, PyMySQL would not check the server
        for url in urls + [f"mysql://roy:hunter2{rest}" for rest in rests]:
            with self.subTest(url), self.assertRaises(ConfigError) as caught:
                Settings(database=url)
            self.assertRegex(str(caught.exception), "^database((?!hunter2).)*$")
        for option in ["ssl_ca", "ssl_cert", "ssl_key"]:
            with self.assertRaisesRegex(ConfigError, f"{option} names /nowhere.pem, which does not exist"):
                Settings(database=f"mysql://roy@db/users?ssl_ca={__file__}&{option}=/nowhere.pem")


# --- Errors and log ---


class ErrorTest(unittest.TestCase):
    def test_any_app_sends_an_auth_error_as_json(self):
        for error, status, name, description, seconds in [
            (server.AuthError("Token missing", 401, "Invalid JWT"), 401, "Invalid JWT", "Token missing", None),
            (server.AuthError("Wait", 429, retry_after=9), 429, "Too Many Requests", "Wait", "9"),
            (server.BadRequest("name must be text"), 400, "Bad Request", "name must be text", None),
            (server.InvalidCredentials(), 401, "Bad Request", "Invalid credentials", None),
            (server.InvalidToken(), 401, "Invalid token", "Session has ended", None),
            (Conflict("exists already"), 409, "Conflict", "exists already", None),
            (server.Unavailable("Too many", retry_after=1), 503, "Service Unavailable", "Too many", "1"),
        ]:
            app = bottle.Bottle()
            app.get("/", callback=mock.Mock(side_effect=error))
            answer = webtest.TestApp(app).get("/", status=status)
            expected = [("status_code", status), ("error", name), ("description", description)]
            self.assertEqual(([*answer.json.items()], str(error)), (expected, description))
            names = ["Content-Type", "Cache-Control", "X-Content-Type-Options", "Retry-After"]
            headers = ["application/json", "no-store", "nosniff", seconds]
            self.assertEqual([answer.headers.get(name) for name in names], headers)


class EventTest(Case):
    def test_each_event_is_one_line_of_json_without_secrets(self):
        evil = 'x"}\n{"event": "login"\r\n\u2028\x1b[31m\x00'
        with self.assertLogs("auth", "DEBUG") as logged:
            self.add_user()
            tokens = self.service.login("alice", "correct horse", NOW, evil, "192.0.2.1")
            for _ in range(6):
                self.assertRaises(server.AuthError, self.service.login, evil, "wrong horse", NOW, evil, "192.0.2.1")
            refreshed = self.service.refresh(tokens["refresh_token"], NOW + 1)
            identity, _ = self.service.authenticate(refreshed["access_token"], NOW + 1)
            api_token = self.service.create_api_token(identity, NOW + 1, "", "backup", 100)
            self.service.change_password(identity, "correct horse", "battery staple", NOW + 1)
            self.assertRaises(server.InvalidToken, self.service.refresh, tokens["refresh_token"], NOW + 100)
            bob = self.store.get_user(self.service.add_user("bob", "battery staple"))
            self.service.disable(bob)
            self.service.enable(self.store.get_user(bob.id))
            self.change_roles("admin", username="bob")
            self.service.logout(server.Identity(bob.id, "bob"), "global")
            self.service.delete_user(bob)
        lines = [record.getMessage() for record in logged.records]
        events = [json.loads(line) for line in lines]
        expected = ["login", *["login_failed"] * 5, "login_throttled", "token_refreshed", "api_token_created"]
        expected += ["password_changed", "refresh_token_reused", "user_created", "user_disabled", "user_enabled"]
        self.assertEqual([event["event"] for event in events], [*expected, "roles_changed", "logout", "user_deleted"])
        self.assertFalse([line for line in lines if not line.isascii() or not line.isprintable()])
        self.assertEqual((events[0]["ip_address"], events[1]["username"]), ("192.0.2.1", evil))
        self.assertEqual((events[0]["user_id"], events[0]["session_id"]), (identity.id, identity.session.id))
        self.assertIsNotNone(datetime.datetime.fromisoformat(events[0]["time"]).tzinfo)
        issued = [token[name] for token in (tokens, refreshed) for name in ("access_token", "refresh_token")]
        for secret in [*issued, api_token["access_token"], "correct horse", "wrong horse", "battery", "pbkdf2", SECRET]:
            self.assertNotIn(secret, "".join(lines))


# --- Passwords ---


class PasswordTest(unittest.TestCase):
    HASHES = {  # of `correct horse`
        # werkzeug 2.3.8, generate_password_hash(password, method=…)
        "sha1": "pbkdf2:sha1:1000$RcSRquBkVldd3xb0$b6e8088ccd123e5dc381c6cd444428da3b29fa7c",
        "sha512": "pbkdf2:sha512:1000$ymryLIfRCssixT9n$155e44d5291196679a50938927981b35e3ab7f3d14d1e60e84fe192f606b93fac8be"
        "0e06eeb85b03e1d37d5b1d9c2bf7827b2e3eaf617d49ee6115b3c73d09f8",
        # werkzeug 3.1.9: its default, and method="pbkdf2"
        "scrypt": "scrypt:32768:8:1$kmldqdEyw0ioShaG$e0a2eecfeaaa6dde2c0614280a6e631d0b61adf0938ee0d512ebb8fcd491face19deca"
        "0db24efa658c30e22ae2e9b287a7051481a6852535db85a614d764d99a",
        "sha256": "pbkdf2:sha256:1000000$Agl0ckX5rQ4TliaU$36b3fb4e6056fb8cbf9c92bc951598dad86231859165d9f94daea7cdebac3a59",
        # Django 5.2.19, make_password(password)
        "Django": "pbkdf2_sha256$1000000$havf2BK4C6TBLNtYYg7f8c$ARTlA5z+gLmokNlMO6PuKn/LLBeuhy3qWI/mB8PpdPc=",
    }

    def test_verify_password_takes_hashes_of_other_programs(self):
        passwords = dict.fromkeys(self.HASHES.values(), "correct horse") | {TUTORIAL_HASH: "roy"}
        for stored, password in passwords.items():
            with self.subTest(stored[:30]):
                self.assertTrue(verify_password(stored, password))
                if "1000000$" not in stored:  # these take half a second each
                    self.assertFalse(verify_password(stored, password.title()))

    def test_verify_password_malformed_or_too_costly_hash_does_not_match(self):
        tail = TUTORIAL_HASH.removeprefix("pbkdf2:sha256:150000")
        for stored in [
            *(None, "", "roy", 0, b"pbkdf2", "$", "$$", "!", "plain$$roy", f"!{TUTORIAL_HASH}", f"{TUTORIAL_HASH}\n"),
            *(TUTORIAL_HASH[:-2], TUTORIAL_HASH[:-1], TUTORIAL_HASH + "00", TUTORIAL_HASH.replace("sha256", "md5")),
            *(f"pbkdf2:sha256{iterations}{tail}" for iterations in ("", ":0", ":-1", ":x", ":99999999999", ":١")),
            *("pbkdf2:::$a$b", *(f"pbkdf2:sha256:1${end}" for end in ("salt$", "salt$zz", "\ud800$" + "0" * 64))),
            *(f"scrypt:{costs}$salt${'0' * 128}" for costs in ("3:8:1", "131072:8:5", "131072:15:9", "9999999:99:9")),
            *("pbkdf2_sha256$1$salt$AAAA", "pbkdf2_sha256$1$salt$====", "pbkdf2_sha1$1$s$ifF+CUuu9Z79Tm+qWi39BQKMxX0="),
        ]:
            with self.subTest(stored=stored):
                self.assertIs(verify_password(stored, "roy"), False)
        self.assertIs(verify_password(TUTORIAL_HASH, "\ud800"), False)
        self.assertIsNone(server.parse_hash(f"scrypt:131072:8:5$salt${'0' * 128}"))  # it would hold a thread for long

    def test_hash_password_writes_the_only_format_that_needs_no_rehash_with_a_new_salt(self):
        first, second = (server.hash_password("pässwörd ☃", 2) for _ in range(2))
        self.assertTrue(first != second and verify_password(first, "pässwörd ☃"))
        self.assertRegex(first, r"^pbkdf2:sha256:2\$[0-9a-f]{32}\$[0-9a-f]{64}$")
        self.assertTrue(server.hash_password("x").startswith("pbkdf2:sha256:600000$"))
        new = [stored for stored in [first, None, "", *self.HASHES.values()] if not server.needs_rehash(stored, 2)]
        self.assertEqual((new, server.needs_rehash(first, 3)), ([first, self.HASHES["sha256"]], True))

    def test_verify_password_spends_the_same_work_for_every_hash(self):
        """The work is counted, with a clock that only hashing moves: wall time would be the machine's, too."""
        work, seconds = [], {"sha1": 3e-7, "sha256": 5e-7, "sha512": 7e-7}  # per iteration

        def hash_for(duration):
            work.append(duration)
            return b""

        def pbkdf2_hmac(name, password, salt, iterations):
            return hash_for(seconds[name] * iterations)

        ours = [server.hash_password("x", iterations) for iterations in (1, 700, 600_000)]
        others = [self.HASHES[name] for name in ("sha1", "sha512", "scrypt")]
        fakes = mock.patch.multiple(hashlib, pbkdf2_hmac=pbkdf2_hmac, scrypt=lambda *_, **__: hash_for(0.1))
        with fakes, mock.patch("time.thread_time", lambda: sum(work)):
            for stored in [None, "", "malformed", f"!{TUTORIAL_HASH}", TUTORIAL_HASH, *ours, *others]:
                work.clear()
                self.assertFalse(verify_password(stored, "y", 600_000))
                self.assertAlmostEqual(sum(work), 0.3, 4, stored)


# --- Store ---


def make_session(sid="A" * 22, **changes):
    session = server.Session(sid, 1, "login", "curl", "192.0.2.1", NOW, NOW, NOW + 900, 1, NOW, "kid")
    return dataclasses.replace(session, **changes)


def in_transaction(store, work):
    return server.transaction(lambda store, run: work(run))(store)


def all_at_once(function, inputs):
    """Call a function in eight threads. Return the results, with None in place of a refusal."""

    def call(value):
        with contextlib.suppress(server.AuthError):
            return function(value)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return [*pool.map(call, inputs)]


def run_in_children(function, number=1):
    """Call a function in child processes at once. Return their exit codes, which are 1 after an exception."""
    children = [multiprocessing.get_context("fork").Process(target=function) for _ in range(number)]
    for step in (multiprocessing.Process.start, multiprocessing.Process.join):
        [*map(step, children)]
    return [child.exitcode for child in children]


@on_each_engine
class StoreTest:
    def add_session(self, session):
        self.assertTrue(self.store.add_session(session, self.store.get_user(session.user_id).password_hash))
        return session

    def test_users_are_added_found_listed_and_deleted_with_their_sessions(self):
        first, second = self.add_user("alice"), self.add_user("bob")
        self.assertEqual([user.username for user in self.store.iter_users()], ["alice", "bob"])
        self.assertEqual(self.store.find_user("bob"), self.store.get_user(second))
        self.assertNotIn("pbkdf2", repr(self.store.get_user(second)))
        self.assertRaisesRegex(Conflict, "The user 'bob' exists already", self.add_user, "bob", "another")
        self.add_session(make_session(user_id=second))
        self.store.delete_user(second)
        self.assertEqual((self.store.find_user("bob"), self.store.get_user(second)), (None, None))
        self.assertEqual(self.raw_sql("SELECT id FROM auth_session"), [])
        self.assertNotIn(self.add_user("carol"), [first, second])  # a token of bob must not fit carol
        self.assertIsNone(self.store.find_user("dave"))
        self.raw_sql("INSERT INTO user (username, password) VALUES ('dave', 'x')")  # each read sees the latest commit
        self.assertTrue(self.store.find_user("dave"))

    def test_roles_are_given_and_taken_and_end_with_the_user(self):
        alice, bob = self.add_user("alice"), self.add_user("bob")
        self.assertEqual(self.store.change_roles(alice, ["b", "a"], []), "a b")
        self.assertEqual(self.store.change_roles(alice, ["c"], ["b", "x"]), "a c")
        self.assertEqual([user.roles for user in self.store.iter_users()], ["a c", ""])
        self.assertEqual([self.store.get_user(alice).roles, self.store.find_user("bob").roles], ["a c", ""])
        names = [f"role{number}" for number in range(20)]
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            list(pool.map(lambda name: self.store.change_roles(bob, [name], []), names))
        self.assertEqual(self.store.get_user(bob).roles, " ".join(sorted(names)))
        for user_id in (alice, bob):
            self.store.delete_user(user_id)
            self.assertRaisesRegex(Conflict, "deleted", self.store.change_roles, user_id, ["a"], [])
        self.assertEqual(self.raw_sql("SELECT user_id FROM auth_user"), [])
        for user_id in range(10):  # of users who were deleted with SQL
            self.raw_sql("INSERT INTO auth_user (user_id, roles) VALUES (%s, 'admin')", user_id)
        self.assertEqual(self.store.get_user(self.add_user("carol")).roles, "")
        self.store.add_users([("dave", "x", ""), ("eve", "x", "admin b")])
        self.assertEqual([self.store.find_user(name).roles for name in ("dave", "eve")], ["", "admin b"])

    def test_create_tables_brings_a_database_of_version_0_2_up_to_date(self):
        session = self.add_session(make_session(user_id=self.add_user("alice")))
        self.raw_sql("DROP TABLE auth_user")
        for column in ("roles", "read_only"):
            self.raw_sql(f"ALTER TABLE auth_session DROP COLUMN {column}")
        self.assertEqual(self.store.missing_tables(), ["auth_user", "auth_session"])
        with concurrent.futures.ThreadPoolExecutor(4) as pool:  # as when several hosts start at once
            for future in [pool.submit(self.another_service) for _ in range(4)]:
                future.result()
        self.assertEqual(self.store.missing_tables(), [])
        self.assertEqual(self.store.read_session(session.id), (session, self.store.find_user("alice")))

    def test_find_user_takes_exactly_the_username_in_every_alphabet(self):
        sql = """'; DROP TABLE user; -- " ` \\' %s ? {}"""
        for name in ["alice", "Ærøskøbing", "日本語", "😀", "O'Brien", 'a"b\\c', sql, "x" * 255]:
            self.assertIsNone(self.store.find_user(name), name)
            self.add_user(name)
            self.assertEqual(self.store.find_user(name).username, name)
        for name in ["ALICE", "alice ", " alice", "álice", "alicé", "al_ce", "%", "", "alice\0", "' OR ''='", "日本"]:
            self.assertIsNone(self.store.find_user(name), name)

    def test_set_password_replaces_only_the_hash_that_was_read(self):
        read = self.store.get_user(self.add_user())
        sessions = [self.add_session(make_session(sid * 22, user_id=read.id)) for sid in "ABC"]
        self.assertTrue(self.store.set_password(read, "newer"))
        self.assertFalse(self.store.set_password(read, "rehash of the older", keep=""))
        self.assertEqual(self.store.list_sessions(read.id, NOW), sessions)
        self.assertTrue(self.store.set_password(self.store.get_user(read.id), "newest", keep="B" * 22))
        self.assertEqual(self.store.get_user(read.id).password_hash, "newest")
        self.assertEqual(self.store.list_sessions(read.id, NOW), sessions[1:2])

    def test_session_and_user_are_read_as_they_were_stored(self):
        for number, label in enumerate(["O'Brien", 'a"b\\c', "日本語😀", "tab\tline\nnul\0", "x" * 255, ""]):
            user_id = self.add_user(f"{number}{label}"[:255].replace("\0", ""))
            session = self.add_session(make_session(str(number) * 22, user_id=user_id, label=label))
            self.assertEqual(self.store.get_session(session.id, NOW), (session, self.store.get_user(user_id)))
        self.store.delete_user(user_id)
        self.assertEqual(self.store.get_session(session.id, NOW), (None, None))

    def test_exception_in_a_transaction_stores_nothing(self):
        self.store.update_buckets("ab", lambda found: {"a": NOW, "b": NOW + 1})
        with self.assertRaises(ZeroDivisionError):
            in_transaction(self.store, lambda run: run("DELETE FROM auth_bucket") and 1 // 0)
        self.assertEqual(sorted(self.raw_sql("SELECT id, expires_at FROM auth_bucket")), [("a", NOW), ("b", NOW + 1)])

    def test_create_tables_keeps_tables_and_refuses_one_without_our_columns(self):
        self.add_user("alice")
        self.store.create_tables()
        self.assertTrue(self.store.find_user("alice"))
        self.raw_sql("DROP TABLE user")
        self.assertEqual(self.store.missing_tables(), ["user"])
        self.raw_sql("CREATE TABLE user (id INTEGER PRIMARY KEY, name VARCHAR(10))")
        self.assertRaisesRegex(ConfigError, "username", self.store.create_tables)

    def test_fork_gives_the_child_connections_of_its_own(self):
        def read_in_child():
            before = len(os.listdir("/proc/self/fd"))
            self.assertTrue(self.store.find_user("alice"))
            self.assertGreater(len(os.listdir("/proc/self/fd")), before)
            self.store.close()

        def change(found):
            self.assertTrue(self.store.find_user("alice"))  # the child inherits an idle connection beside this one
            self.assertEqual(run_in_children(read_in_child), [0])
            self.assertTrue(self.store.find_user("alice"))
            return {"bucket": NOW}

        self.add_user()
        self.store.update_buckets(["bucket"], change)
        self.assertEqual(self.raw_sql("SELECT id, expires_at FROM auth_bucket"), [("bucket", NOW)])

    def test_failing_database_is_unavailable_and_logged_once_and_leaks_no_connection(self):
        self.add_user()
        self.store.close()
        self.store.database = dataclasses.replace(self.store.database, name="nowhere")
        if self.database.startswith("sqlite"):
            (self.folder / "auth.db").write_bytes(b"x" * 5000)
        count = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            self.assertRaises(server.Unavailable, self.store.get_user, 1)
        self.assertLessEqual(len(os.listdir("/proc/self/fd")), count + 1)
        self.assertEqual([(event["kind"], bool(event["error"])) for event in EVENTS], [("read", True)])


class SQLiteTest(Case):
    def test_version_changes_with_each_commit_and_new_index_and_only_then(self):
        self.add_user()
        before = self.store.version(NOW)
        self.assertIsNotNone(before)
        self.store.find_user("alice")
        self.raw_sql("DELETE FROM user WHERE id = 99")
        self.assertEqual(self.store.version(NOW), before)
        script = "import sqlite3, sys; c = sqlite3.connect('auth.db'); c.execute(sys.argv[1]); c.commit()"
        update = "UPDATE user SET password = password || 'x'"
        run_elsewhere = functools.partial(subprocess.run, [sys.executable, "-c", script, update], cwd=self.folder)
        versions = [before]
        for commit in [lambda: self.add_user("bob"), run_elsewhere, run_elsewhere, lambda: self.raw_sql(update)]:
            commit()
            versions.append(self.store.version(NOW))
        self.raw_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        self.raw_sql(update)
        versions.append(self.store.version(NOW))
        self.store.close()
        for _ in range(2):  # SQLite removes the index with the last connection; a new one begins with the same header
            versions.append(self.store.version(NOW))
            self.store.close()
            self.assertFalse((self.folder / "auth.db-shm").exists())
        self.assertEqual(len({*versions, self.store.version(NOW)}), 9)

    def test_version_takes_no_lock_of_sqlite_away(self):
        """Else the next process would truncate the index, and this one would die of SIGBUS."""

        def locks():
            inode = os.stat(self.folder / "auth.db-shm").st_ino
            lines = Path("/proc/locks").read_text().splitlines()
            return len([line for line in lines if f" {os.getpid()} " in line and f":{inode} " in line])

        self.add_user()
        before = locks()
        self.assertTrue(self.store.version(NOW))
        with contextlib.closing(server.Store.open(self.settings)) as other:
            self.assertTrue(other.version(NOW))
        self.assertEqual((before, locks()), (1, 1))

    def test_memory_is_one_database_for_all_threads_and_leaves_no_file(self):
        self.settings = dataclasses.replace(self.settings, database="sqlite://")
        self.assertIsNone(self.store.version(NOW))  # it has no index
        names = [*map(str, range(50))]
        self.assertEqual(sorted(all_at_once(self.add_user, names)), [*range(1, 51)])
        self.assertEqual([user.username for user in all_at_once(self.store.find_user, names)], names)
        self.assertEqual([*self.folder.iterdir()], [])

    def test_files_are_for_the_owner_only_and_commits_survive_a_power_cut(self):
        self.add_user()
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in self.folder.iterdir()}
        self.assertEqual(modes, dict.fromkeys(["auth.db", "auth.db-shm", "auth.db-wal"], 0o600))
        synchronous = in_transaction(self.store, lambda run: run("PRAGMA synchronous").fetchone())
        self.assertEqual((self.raw_sql("PRAGMA journal_mode"), synchronous), ([("wal",)], (2,)))

    def test_damaged_row_is_a_user_who_cannot_log_in(self):
        self.add_user()
        self.raw_sql("UPDATE user SET password = CAST(x'ff00fe' AS TEXT)")
        self.assertEqual(len([*self.store.iter_users()]), 1)
        self.assertRaises(server.InvalidCredentials, self.service.login, "alice", "correct horse", NOW)


class MySQLTest(MySQLCase):
    def test_lost_connection_is_replaced_and_a_lost_commit_is_not_repeated(self):
        def insert(run, *steps):
            attempts.append(run("SELECT CONNECTION_ID()").fetchone()[0])
            for step in steps:
                if step == "kill" and len(attempts) == 1:
                    mariadb.run(f"KILL {attempts[0]}")
                elif step == "insert":
                    run("INSERT INTO user (username, password) VALUES ('alice', 'x')")

        attempts = []
        in_transaction(self.store, lambda run: insert(run, "kill", "insert"))
        self.assertEqual((len(attempts), len([*self.store.iter_users()])), (2, 1))
        mariadb.run(f"KILL {attempts[1]}")
        self.assertTrue(self.store.find_user("alice"))
        self.assertEqual(EVENTS, [])
        self.store.delete_user(1)
        attempts = []
        with self.assertRaises(server.Unavailable):  # it may have succeeded
            in_transaction(self.store, lambda run: insert(run, "insert", "kill"))
        self.assertEqual(len(attempts), 1)

    def test_write_that_waits_for_a_lock_does_not_stop_reads(self):
        self.database += "?read_timeout=2"
        self.add_user()
        with contextlib.closing(mariadb.connect()) as backup, backup.cursor() as cursor:
            cursor.execute("FLUSH TABLES WITH READ LOCK")
            writer = threading.Thread(target=all_at_once, args=(self.add_user, ["bob"]))
            writer.start()
            reads = 0
            while writer.is_alive():
                reads += bool(self.store.find_user("alice"))
        writer.join()
        self.assertGreater(reads, 100)
        self.assertEqual([event["kind"] for event in EVENTS], ["write"])
        self.assertTrue(self.add_user("bob"))

    def test_create_tables_without_server_database_or_right_says_why(self):
        warnings.simplefilter("ignore", ResourceWarning)  # PyMySQL leaves a unix socket open that it cannot connect
        mariadb.run("CREATE OR REPLACE USER reader@localhost IDENTIFIED BY 'p/:@%?#ü'")
        mariadb.run(f"GRANT SELECT ON {self.name}.* TO reader@localhost")
        reader = mariadb.url(self.name, "reader", "p/:@%?#ü", unix_socket=mariadb.socket)
        for url, words in [
            (reader, "denied.*`server.py init` as an administrator"),
            (mariadb.url(self.name, "root", "hunter2"), "Access denied"),
            (f"mysql://root@127.0.0.1:{free_port()}/{self.name}", "refused"),
            (f"mysql://root@db..example/{self.name}", "label empty"),
            (mariadb.url("nowhere"), "Unknown database"),
            (mariadb.url(self.name, unix_socket="/nowhere"), "/nowhere"),
            (mariadb.url(self.name, ssl_ca=__file__), "(?i)certificate|ssl"),
        ]:
            store = server.Store.open(dataclasses.replace(self.settings, database=url))
            with self.subTest(url), self.assertRaisesRegex(ConfigError, words) as caught:
                store.create_tables()
            self.assertRegex(str(caught.exception), "^((?!hunter2|p/:@).)*AUTH_DATABASE")

    def test_next_host_is_taken_when_one_is_down(self):
        self.database = f"mysql://root@127.0.0.1:{free_port()},127.0.0.1:{mariadb.port}/{self.name}"
        self.assertTrue(self.add_user())


class TutorialTableTest(MySQLCase):
    def setUp(self):
        super().setUp()
        self.raw_sql(TUTORIAL_TABLE)
        self.raw_sql("INSERT INTO user (username, password) VALUES ('roy', %s)", TUTORIAL_HASH)
        self.structure = self.table()

    def tearDown(self):
        self.assertEqual(self.table(), self.structure)

    def table(self):
        return re.sub(r" AUTO_INCREMENT=\d+", "", self.raw_sql("SHOW CREATE TABLE user")[0][1])

    def assert_no_login(self, username, password):
        answer = self.client.post_json("/auth", {"username": username, "password": password}, status=401)
        self.assert_refused(answer, 401, "Bad Request", "Invalid credentials")

    def test_roy_logs_in_and_his_hash_is_replaced_and_he_logs_in_again(self):
        self.settings = dataclasses.replace(self.settings, pbkdf2_iterations=150_001)
        self.assertTrue(self.login("roy", "roy"))
        [(stored,)] = self.raw_sql("SELECT password FROM user")
        self.assertTrue(stored.startswith("pbkdf2:sha256:150001$"), stored)
        token = self.login("roy", "roy")
        self.assertEqual(self.raw_sql("SELECT password FROM user"), [(stored,)])
        self.assertEqual(self.get("/auth/me", token).json["username"], "roy")

    def test_rows_with_null_or_empty_text_or_the_same_username_let_no_client_in(self):
        self.raw_sql("INSERT INTO user (username, password) VALUES (NULL, NULL), ('ann', NULL), ('bob', ''), ('', 'x')")
        for username, password in itertools.product(["ann", "bob", ""], ["", "x", "None"]):
            self.assert_no_login(username, password)
        self.assertEqual(len([*self.store.iter_users()]), 5)
        self.service.set_password(self.store.find_user("ann"), "correct horse")
        self.assertTrue(self.login("ann"))
        self.raw_sql("INSERT INTO user (username, password) VALUES ('roy', %s)", TUTORIAL_HASH)
        self.assert_no_login("roy", "roy")
        [event] = self.events("duplicate_username")
        self.assertIn("'roy' (ids 1, 6)", event["error"])
        self.assertRaisesRegex(Conflict, r"'roy' \(ids 1, 6\)", self.store.find_user, "roy")

    def test_usernames_are_compared_exactly_and_refused_if_the_table_cannot_hold_them(self):
        self.add_user("ROY", "other")
        self.assertEqual(self.get("/auth/me", self.login("ROY", "other")).json["username"], "ROY")
        self.assert_no_login("ROY", "roy")
        for name in ["日本語", "x" * 46]:
            with self.subTest(name), self.assertRaisesRegex(server.BadRequest, "columns of the table are too short"):
                self.add_user(name)
            self.assert_no_login(name, "x")

    def test_add_user_many_times_at_once_succeeds_once(self):
        barrier = threading.Barrier(8)  # so that there are eight connections before the race
        all_at_once(lambda _: in_transaction(self.store, lambda run: barrier.wait(30)), range(8))
        all_at_once(lambda _: self.add_user("alice"), range(16))
        self.assertEqual(self.raw_sql("SELECT COUNT(*) FROM user WHERE username = 'alice'"), [(1,)])


# --- Keys and tokens ---


class KeyTest(unittest.TestCase):
    def test_key_makes_and_verifies_the_signature_and_thumbprint_of_rfc_8037(self):
        jwk = {"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}
        key = server.Key.from_jwk(jwk | {"d": "nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A"})
        self.assertEqual(key.kid, "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k")
        message = b"eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc"
        signature = "hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg"
        made = key.signer.Algorithm.sign(message, key.signer.key)
        self.assertEqual(base64url(made), signature)
        self.assertTrue(key.verifier.Algorithm.verify(message, key.verifier.key, made))
        self.assertFalse(key.verifier.Algorithm.verify(message + b".", key.verifier.key, made))

    def test_from_jwk_unusable_key_is_refused_and_not_repeated(self):
        hs256, eddsa, es256 = (server.new_jwk(algorithm) for algorithm in ("HS256", "EdDSA", "ES256"))
        two_halves = es256 | {"d": server.new_jwk("ES256")["d"]}
        for words, jwks in [
            ("not a private JSON Web Key", [None, 5, "k", [], {}, {"kty": "oct"}, {"kty": []}, {"kty": "XYZ"}]),
            ("not a private JSON Web Key", [hs256 | {"k": k} for k in (5, None, "§")]),
            ("not a private JSON Web Key", [hs256 | {"alg": alg} for alg in ("none", "RS256", "HS257", 5)]),
            ("not a private JSON Web Key", [two_halves, server.Key.from_jwk(eddsa).public]),
            ("not for signing with one of HS256, EdDSA, ES256, RS256", [hs256 | {"alg": "HS512"}]),
            ("use or key_ops", [es256 | {"use": use} for use in ("enc", "", None, ["sig"])]),  # Wycheproof 354
            ("use or key_ops", [es256 | {"key_ops": ops} for ops in (["verify"], [], {}, None, 5)]),  # Wycheproof 356
        ]:
            for jwk in jwks:
                with self.subTest(jwk=jwk), self.assertRaisesRegex(ConfigError, words) as caught:
                    server.Key.from_jwk(jwk)
                texts = str(caught.exception) + repr([server.Key.from_jwk(jwk) for jwk in (hs256, eddsa, es256)])
                self.assertFalse([secret for secret in (hs256["k"], eddsa["d"], es256["d"]) if secret in texts])
        self.assertTrue(server.Key.from_jwk(es256 | {"use": "sig", "key_ops": ["verify", "sign"]}))


class TokenTest(unittest.TestCase):
    # The tutorial's example: HS256 with `secret-key`, as PyJWT 1.7 wrote it.
    TUTORIAL_TOKEN = (
        "eyJ0eXAiOiJKV1QiLCJhbGciOiJIUzI1NiJ9.eyJleHAiOjE1NjgyMTAzMjcsImlhdCI6MTU2ODIxMDAyNywibmJmIjoxNTY4MjEwMDI3LCJp"
        "ZGVudGl0eSI6MX0.nTgsAwHL4oNEVVWMfLLUMFUaoDVHA0zuVMBgRbevggE"
    )

    def setUp(self):
        self.keys, self.others = (KeySet([server.Key.from_secret(secret)]) for secret in (SECRET, SECRET + "2"))

    def verify(self, now=NOW, leeway=0, **changes):
        claims = {"exp": NOW + 300, "iat": NOW, "nbf": NOW, "identity": 1} | changes
        return self.keys.verify(jwt.encode(claims, SECRET, "HS256"), now, leeway)

    def test_verify_takes_tokens_of_our_keys_only(self):
        claims = {"exp": NOW + 300, "iat": NOW, "nbf": NOW, "identity": 7, "sub": "7"}
        token = self.keys.sign(claims)
        self.assertEqual(self.keys.verify(token, NOW), claims)
        header = json.loads(base64.urlsafe_b64decode(token.partition(".")[0] + "=="))
        self.assertEqual([*header.items()], [("typ", "JWT"), ("alg", "HS256"), ("kid", self.keys.keys[0].kid)])
        for token in (self.TUTORIAL_TOKEN, self.others.sign(claims)):
            with self.assertRaisesRegex(server.InvalidToken, "^Signature verification failed$"):
                self.keys.verify(token, 1568210100)

    def test_verify_takes_the_tutorials_token_with_its_secret(self):
        warnings.simplefilter("ignore", jwt.InsecureKeyLengthWarning)
        jwk = jwt.PyJWK.from_dict({"kty": "oct", "alg": "HS256", "k": base64url(b"secret-key")})
        keys = KeySet([dataclasses.replace(self.keys.keys[0], signer=jwk, verifier=jwk)])
        claims = {"exp": 1568210327, "iat": 1568210027, "nbf": 1568210027, "identity": 1}
        self.assertEqual(keys.verify(self.TUTORIAL_TOKEN, 1568210100), claims)

    def test_verify_compares_times_with_now_and_leeway_although_the_token_is_cached(self):
        for now, leeway in [(NOW + 299, 0), (NOW + 309, 10), (NOW - 10, 10)]:
            self.assertTrue(self.verify(now, leeway))
        self.assertTrue(self.verify(iat=NOW - 0.5, nbf=NOW - 0.5, exp=NOW + 0.5, sub="1", sid="A" * 22))
        for now, leeway, changes, words in [
            (NOW + 300, 0, {}, "^Signature has expired$"),
            (NOW + 310, 10, {}, "^Signature has expired$"),
            (NOW - 1, 0, {"nbf": NOW - 5}, r"not yet valid \(iat\)"),
            (NOW - 1, 0, {"iat": NOW - 5}, r"not yet valid \(nbf\)"),
        ]:
            with self.subTest(words, now=now), self.assertRaisesRegex(server.InvalidToken, words):
                self.verify(now, leeway, **changes)


class KeyFileCase(Case):
    def setUp(self):
        super().setUp()
        self.path = self.folder / "auth.keys"
        self.settings = Settings(key_file=str(self.path))

    def load(self, create=False, **changes):
        return KeySet.load(dataclasses.replace(self.settings, **changes), create)

    def add_key(self, algorithm="HS256", path=None):
        with server.edit_key_file(path or self.path) as jwks:
            jwks.insert(0, server.new_jwk(algorithm))
        return server.Key.from_jwk(jwks[0])

    def remove_key(self, kid):
        with server.edit_key_file(self.path) as jwks:
            del jwks[server.find_jwk(kid, jwks)]


class KeyFileTest(KeyFileCase):
    def test_load_many_times_at_once_creates_the_file_once(self):
        [kid] = {keys.keys[0].kid for keys in all_at_once(lambda _: self.load(create=True), range(16))}
        self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), 0o600)
        self.assertEqual(sorted(os.listdir(self.folder)), ["auth.keys"])  # no draft is left
        [jwk] = json.loads(self.path.read_text())["keys"]
        self.assertEqual((jwk["kid"], len(base64.urlsafe_b64decode(jwk["k"] + "="))), (kid, 32))

    def test_edit_that_is_killed_or_fails_changes_nothing_and_leaves_no_lock(self):
        def edit():
            with server.edit_key_file(self.path) as jwks:
                jwks.clear()
                (self.folder / "auth.keys.draft").write_text("half a key")
                os.kill(os.getpid(), signal.SIGKILL)

        for number in (1, 2):
            self.assertEqual(run_in_children(edit), [-signal.SIGKILL])
            self.add_key()
            self.assertEqual(len(self.load().keys), number)
        self.assertRaisesRegex(ConfigError, "there is no key 'x'; `key list` shows the keys", self.remove_key, "x")
        self.assertEqual(len(self.load().keys), 2)
        self.assertEqual(sorted(os.listdir(self.folder)), ["auth.keys"])  # no draft is left

    def test_edit_by_many_processes_at_once_loses_no_key(self):
        self.assertEqual(run_in_children(lambda: [self.add_key() for _ in range(4)], 8), [0] * 8)
        self.assertEqual(len({key.kid for key in self.load().keys}), 32)

    def test_edit_keeps_owner_mode_and_link(self):
        self.add_key()
        self.path.chmod(0o640)
        owner = (1234, 1001) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
        os.chown(self.path, *owner)
        (self.folder / "link.keys").symlink_to(self.path)
        self.add_key(path=self.folder / "link.keys")
        status = self.path.stat()
        self.assertEqual((stat.S_IMODE(status.st_mode), (status.st_uid, status.st_gid)), (0o640, owner))
        self.assertEqual((len(self.load().keys), sorted(os.listdir(self.folder))), (2, ["auth.keys", "link.keys"]))

    def test_load_file_that_is_missing_or_open_to_others_says_what_to_do(self):
        for load, words in [
            (self.load, "the service makes it at its first start"),
            (lambda: self.load(True, key_file=f"{self.folder}/no/keys"), "No such file .*AUTH_KEY_FILE"),
            (lambda: self.load(key_file=str(self.folder)), "Is a directory; .*AUTH_KEY_FILE"),
            (lambda: os.mkfifo(self.path, 0o600) or self.load(), "not a JWK Set"),
        ]:
            with self.subTest(words), self.assertRaisesRegex(ConfigError, f"^key file .*{words}"):
                load()
        self.path.unlink()
        self.add_key()
        for mode in (0o600, 0o400, 0o640):
            self.path.chmod(mode)
            self.load()
        for mode in (0o644, 0o604, 0o620, 0o606):
            self.path.chmod(mode)
            with self.subTest(mode), self.assertRaisesRegex(ConfigError, f"{mode:04o}.; run: chmod 600 {self.path}"):
                self.load()

    def test_load_malformed_file_is_refused_and_not_repeated_and_stays(self):
        from cryptography.hazmat.primitives.asymmetric import rsa

        jwk, bad_texts = server.new_jwk("HS256"), [b"short", b"x" * 32, b"a-string-secret-at-least-256-bits-long"]
        changes = [{"k": base64url(text)} for text in bad_texts] + [{"key_ops": None}, {"use": "enc"}]
        sets = [{}, [], jwk["k"], [jwk["k"]], [jwk, jwk], [jwk, {}], [[jwk]], {"a": jwk}]
        sets += [[jwk | change] for change in changes]
        sets.append([jwt.get_algorithm_by_name("RS256").to_jwk(rsa.generate_private_key(65537, 2048), as_dict=True)])
        texts = ["", jwk["k"], "[]", "{}", "[" * 100_000, "\udcff", json.dumps({"keys": [jwk]})[:-2]]
        for content in [os.fsencode(text) for text in texts + [json.dumps({"keys": keys}) for keys in sets]]:
            self.path.write_bytes(content)
            self.path.chmod(0o600)
            words = f"^key file {self.path}: "
            for use in (functools.partial(self.load, create=True), self.add_key):
                with self.subTest(content[:60]), self.assertRaisesRegex(ConfigError, words) as caught:
                    use()
                self.assertNotIn(jwk["k"], str(caught.exception))
            self.assertEqual(self.path.read_bytes(), content)


class RotationTest(KeyFileCase):
    """The key file changes under a key set that is in use."""

    def setUp(self):
        super().setUp()
        self.keys = self.load(create=True)
        self.claims = {"exp": NOW + 900, "iat": NOW, "nbf": NOW, "identity": 1}
        self.session = make_session(kid=self.keys.keys[0].kid)

    def sign_at(self, now, keys=None):
        return (keys or self.keys).sign(self.claims | {"iat": now})

    def test_newest_key_signs_and_all_verify_until_they_are_removed(self):
        tokens = [self.sign_at(NOW)]
        refresh, digest = self.keys.opaque_token(self.session), self.keys.digest("roy", NOW)
        for now, algorithm in enumerate(["EdDSA", "ES256", "RS256", "HS256"], NOW + 1):
            key = self.add_key(algorithm)
            tokens.append(self.sign_at(now))
            header = jwt.get_unverified_header(tokens[-1])
            self.assertEqual(header, {"typ": "JWT", "alg": algorithm, "kid": key.kid})
            self.assertEqual([self.keys.verify(token, now)["identity"] for token in tokens], [1] * len(tokens))
            newer = self.keys.opaque_token(dataclasses.replace(self.session, kid=key.kid))
            self.assertEqual((self.keys.opaque_token(self.session), newer == refresh), (refresh, False))
            for token in (refresh, newer):
                self.assertEqual(self.keys.read_opaque_token(token, now), (self.session.id, 1))
            self.assertEqual(self.keys.digest("roy", now), digest)
        published = json.loads(json.dumps(self.keys.public(NOW + 4)))
        self.assertEqual([jwk["alg"] for jwk in published["keys"]], ["RS256", "ES256", "EdDSA"])
        self.assertFalse({"d", "k", "p", "q", "dp", "dq", "qi", "oth"} & {*itertools.chain(*published["keys"])})
        for token in tokens[1:4]:
            header = jwt.get_unverified_header(token)
            key = jwt.PyJWKSet.from_dict(published)[header["kid"]]
            options = {"verify_exp": False, "verify_iat": False, "verify_nbf": False}
            self.assertEqual(jwt.decode(token, key, [header["alg"]], options)["identity"], 1)
        self.remove_key(self.session.kid)
        for verify, token in [(self.keys.verify, tokens[0]), (self.keys.read_opaque_token, refresh)]:
            self.assertRaises(server.InvalidToken, verify, token, NOW + 9)
        self.assertNotEqual(self.keys.digest("roy", NOW + 9), digest)

    def test_changed_file_is_read_within_a_second_and_for_an_unknown_key_at_once(self):
        self.keys.public(NOW)
        self.add_key()
        self.assertTrue(self.keys.verify(self.sign_at(NOW, self.load()), NOW))
        session = dataclasses.replace(self.session, kid=self.add_key().kid)
        self.assertTrue(self.keys.read_opaque_token(self.load().opaque_token(session), NOW))
        session = dataclasses.replace(self.session, kid=self.add_key().kid)
        self.assertEqual(self.keys.opaque_token(session), self.load().opaque_token(session))
        kid = self.add_key().kid
        self.assertEqual((self.keys.signing_key(NOW + 0.9).kid, self.keys.signing_key(NOW + 1).kid), (session.kid, kid))
        self.assertEqual([len(event["keys"]) for event in self.events("key_rotated")], [2, 3, 4, 5])

    def test_broken_file_leaves_the_keys_and_is_logged_once_and_tried_again(self):
        token, good = self.sign_at(NOW), self.path.read_text()
        jwk = json.loads(good)["keys"][0]
        unknown = {"kty": "EC", "crv": "P-521", "alg": "ES512", "x": "x", "y": "y", "d": "d"}
        twice, strange = json.dumps({"keys": [jwk, jwk]}), json.dumps({"keys": [jwk, unknown]})
        for number, content in enumerate(["", good[: len(good) // 2], twice, strange, None], 1):
            self.path.unlink() if content is None else self.path.write_text(content)
            for later in (0, 0.99, 0.999, 1.9):
                self.assertTrue(self.keys.verify(token, NOW + 3 * number + later))
            self.assertEqual([event["event"] for event in EVENTS], ["key_reload_failed"] * number, content)
            self.assertNotIn(jwk["k"], json.dumps(EVENTS))
        kid = self.add_key().kid
        for mode, now, is_read in [(0o644, NOW + 50, False), (0o600, NOW + 51, True)]:
            self.path.chmod(mode)
            self.assertEqual(self.keys.signing_key(now).kid == kid, is_read)

    def test_secret_key_verifies_beside_the_file_whose_first_key_signs(self):
        missing = self.folder / "none.keys"
        keys = self.load(create=True, secret_key=SECRET, key_file=str(missing))
        self.assertFalse(missing.exists())
        token = self.sign_at(NOW, keys)
        added = self.add_key(path=missing)  # while the service runs
        self.assertEqual(keys.signing_key(NOW + 1).kid, added.kid)
        self.assertEqual([key.kid for key in keys.keys], [added.kid, server.Key.from_secret(SECRET).kid])
        self.assertTrue(keys.verify(token, NOW + 1))

    def test_key_of_another_algorithm_or_public_key_as_secret_verifies_nothing(self):
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        hs256, es256 = self.keys.keys[0], self.add_key("ES256")
        self.keys.public(NOW + 2)
        forged = [jwt.encode(self.claims, hs256.signer, headers={"kid": es256.kid})]
        forged += [jwt.encode(self.claims, es256.signer, headers={"kid": hs256.kid})]
        public = es256.verifier.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        for secret in [public, json.dumps(es256.public).encode(), es256.public["x"].encode()]:
            for header in [{"alg": "HS256", "kid": es256.kid}, {"alg": "HS256"}, {"alg": "ES256", "kid": hs256.kid}]:
                parts = ".".join(base64url(json.dumps(part).encode()) for part in (header, self.claims))
                forged.append(f"{parts}.{base64url(hmac.digest(secret, parts.encode(), 'sha256'))}")
        for token in forged:
            with self.subTest(token), self.assertRaises(server.InvalidToken):
                self.keys.verify(token, NOW + 2)


# --- Auth service ---


def count_iterations():
    """Patch hashlib so that derive.spent() in `with count_iterations() as derive` is the PBKDF2 iterations so far."""
    derive = mock.Mock(wraps=hashlib.pbkdf2_hmac)
    derive.spent = lambda: sum(call.kwargs.get("iterations") or call.args[3] for call in derive.call_args_list)
    return mock.patch("hashlib.pbkdf2_hmac", derive)


@on_each_engine
class LoginTest:
    users = ("alice",)

    def test_login_with_right_password_returns_tokens_of_the_user(self):
        tokens, more = self.open_session(NOW + 0.9), self.open_session()
        self.assertEqual((tokens["token_type"], tokens["expires_in"]), ("Bearer", 300))
        identity, claims = self.service.authenticate(tokens["access_token"], NOW + 309.9)  # with the leeway of 10 s
        self.assertEqual((identity.id, identity.username), (1, "alice"))
        times = {"exp": NOW + 300, "iat": NOW, "nbf": NOW, "identity": 1, "sub": "1"}
        self.assertEqual(claims, times | {"jti": claims["jti"], "sid": identity.session.id})
        self.assertNotEqual(self.service.authenticate(more["access_token"], NOW)[1]["jti"], claims["jti"])
        with self.assertRaisesRegex(server.InvalidToken, "Signature has expired"):
            self.service.authenticate(tokens["access_token"], NOW + 310)

    def test_login_of_unknown_user_or_with_cheap_hash_costs_as_much_as_the_most_expensive_one(self):
        self.service = self.with_settings(pbkdf2_iterations=2000)
        for username, iterations in [("cheap", 1), ("costly", 5000), ("absurd", 100_000)]:
            self.store.add_user(username, server.hash_password("correct horse", iterations))
        refusals, costs = set(), "unknown 2000, cheap 2000, costly 5000, cheap 5000, unknown 5000"
        for cost in [*costs.split(", "), "absurd 100000", "unknown 5000"]:  # an absurd row slows only itself
            username, iterations = cost.split()
            with self.subTest(username), count_iterations() as derive:
                with self.assertRaises(server.InvalidCredentials) as refused:
                    self.service.login(username, "wrong", NOW)
                self.assertEqual(derive.spent(), int(iterations))
                refusals.add((refused.exception.status, refused.exception.body))
        self.assertEqual(len(refusals), 1)

    def test_login_with_old_hash_replaces_it_after_success_if_it_can_be_stored(self):
        self.service = self.with_settings(pbkdf2_iterations=2)
        old = self.store.find_user("alice").password_hash
        with self.assertRaises(server.InvalidCredentials):
            self.service.login("alice", "wrong", NOW)
        self.assertEqual(self.store.find_user("alice").password_hash, old)
        for _ in range(2):
            self.assertTrue(self.identity(self.open_session()))
            self.assertRegex(self.store.find_user("alice").password_hash, r"^pbkdf2:sha256:2\$")
        self.service = self.with_settings(pbkdf2_iterations=3)
        sqlite, mysql = "BEGIN SELECT RAISE(FAIL, 'no'); END", "FOR EACH ROW SIGNAL SQLSTATE '45000'"
        self.raw_sql(f"CREATE TRIGGER t BEFORE UPDATE ON user {mysql if isinstance(self, MySQLCase) else sqlite}")
        self.assertTrue(self.identity(self.open_session()))
        self.assertNotIn("pbkdf2", str(self.events("rehash_failed")[0]))


@on_each_engine
class SessionTest:
    users = ("alice",)

    def test_refresh_keeps_the_session_and_moves_its_times(self):
        first = self.open_session(label="curl/8", ip_address="192.0.2.1")
        before, after = self.identity(first).session, self.identity(self.refresh(first, NOW + 9), NOW + 9).session
        times = {"refreshed_at": NOW + 9, "last_used_at": NOW + 9, "expires_at": before.expires_at + 9}
        for now, noted in [(NOW + 68, NOW + 9), (NOW + 69, NOW + 69), (NOW + 128, NOW + 69)]:  # noted once a minute
            self.identity(first, now)
            self.assertEqual(self.sessions()[0][2], noted)
        self.assertEqual(after, dataclasses.replace(before, refresh_counter=2, **times))
        self.assertEqual((after.label, after.ip_address, after.created_at), ("curl/8", "192.0.2.1", NOW))

    def test_refresh_with_previous_token_within_a_minute_returns_the_current_one(self):
        first = self.open_session()
        second = self.refresh(first, NOW + 100.9)
        again = self.refresh(first, NOW + 160.8)
        self.assertEqual(again["refresh_token"], second["refresh_token"])
        self.assertNotEqual(again["access_token"], second["access_token"])
        self.assertTrue(self.identity(again, NOW + 161))
        self.assertTrue(self.refresh(second, NOW + 200))

    def test_refresh_with_stolen_token_ends_the_session(self):
        for refreshes, now in [(1, NOW + 161), (2, NOW + 100)]:  # previous token after a minute, older one at once
            EVENTS.clear()
            first = latest = self.open_session()
            for _ in range(refreshes):
                latest = self.refresh(latest, NOW + 100)
            with self.subTest(refreshes), self.assertRaises(server.InvalidToken):
                self.refresh(first, now)
            self.assert_ended(latest, now)
            [event] = self.events("refresh_token_reused")
            self.assertNotIn(first["refresh_token"], str(event))

    def test_refreshes_at_once_with_one_token_all_return_the_same_new_token(self):
        first, start = self.open_session(), threading.Barrier(16)
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: start.wait() >= 0 and self.refresh(first, NOW + 1), range(16)))
        self.assertEqual(len({tokens["refresh_token"] for tokens in answers}), 1)
        self.assertEqual(len({tokens["access_token"] for tokens in answers}), 16)
        self.assertEqual(self.identity(answers[0], NOW + 1).session.refresh_counter, 2)

    def test_session_lives_from_refresh_to_refresh_and_no_longer_than_its_maximum(self):
        self.service = self.with_settings(session_idle_timeout=1000, session_max_age=2500)
        idle, tokens = self.open_session(), self.open_session()
        for now, expires_at in [(NOW + 900, 1900), (NOW + 1800, 2500), (NOW + 2400, 2500)]:
            tokens = self.refresh(tokens, now)
            self.assertEqual(self.identity(tokens, now).session.expires_at, NOW + expires_at)
        self.assertEqual(tokens["expires_in"], 100)
        self.assert_ended(tokens, NOW + 2500)
        self.service = self.with_settings(session_max_age=900)  # lowered while sessions live
        for ended, now in [(idle, NOW + 1000), (self.open_session(), NOW + 950)]:
            self.assert_ended({"refresh_token": ended["refresh_token"]}, now)

    def test_bad_opaque_token_is_refused_and_changes_nothing(self):
        tokens = self.open_session()
        api_token = self.create_api_token(tokens)["access_token"]
        session, before = self.identity(tokens).session, self.sessions()
        other_keys = KeySet([server.Key.from_secret("another secret of the tests, of more than 32 bytes")])
        for token, use in [(tokens["refresh_token"], self.service.refresh), (api_token, self.service.authenticate)]:
            sid, counter, mac = token.split(".")
            bad = ["", ".", "..", "x", sid, mac, f"{sid}.{mac}", token[:-1], token[1:], token + "x", token + "\n"]
            bad += [token.upper(), token * 2, "\0", "é" * 100, "x" * 50_000, f" {token}", f"{sid}.{counter}.{'A' * 43}"]
            bad += [f"{'A' * 22}.{counter}.{mac}", *(f"{sid}.{each}.{mac}" for each in (2, "01", "-1", "١", "1" * 17))]
            bad += [other_keys.opaque_token(dataclasses.replace(session, refresh_counter=int(counter)))]
            for each in bad:
                with self.subTest(each[:60], use=use.__name__), self.assertRaises(server.InvalidToken):
                    use(each, NOW)
        newer = self.service.keys.opaque_token(dataclasses.replace(session, refresh_counter=5))  # than the database
        for token in ["\ud800", tokens["access_token"], api_token, newer]:
            with self.subTest(token), self.assertRaisesRegex(server.InvalidToken, "not (a refresh token|from)"):
                self.service.refresh(token, NOW)
        with self.assertRaisesRegex(server.InvalidToken, "refresh token is for POST /auth/refresh"):
            self.service.authenticate(tokens["refresh_token"], NOW)
        self.assertEqual(self.sessions(), before)
        self.assertTrue(self.identity({"access_token": api_token}))
        self.assertTrue(self.refresh(tokens, NOW))

    def test_authenticate_with_bad_token_is_refused(self):
        self.assertEqual(self.service.authenticate(self.token(), time.time())[0].username, "alice")
        for token, words in bad_tokens(NOW):
            with self.subTest(token[:80]), self.assertRaisesRegex(server.InvalidToken, words):
                self.service.authenticate(token, NOW)

    def test_change_password_with_wrong_current_one_is_refused_and_throttled(self):
        change = functools.partial(self.service.change_password, self.identity(self.open_session()), now=NOW)
        for new in ["", None, 5, "alice", "password1"] * 2:  # these do not count as failed logins
            with self.subTest(new=new), self.assertRaises(server.BadRequest):
                change("correct horse", new)
        for current in ["wrong", "", "\ud800", "x" * 5000, "Correct horse"]:
            with self.subTest(current), self.assertRaisesRegex(server.BadRequest, "not the current password"):
                change(current, "battery staple")
        with self.assertRaisesRegex(server.AuthError, "Too many failed logins"):
            change("correct horse", "battery staple")

    def test_session_is_not_added_after_uncommitted_logout_or_new_password(self):
        user, creator = self.store.find_user("alice"), self.identity(self.open_session()).session
        session = dataclasses.replace(creator, id="A" * 22)
        beside = mariadb.connect(self.name) if isinstance(self, MySQLCase) else sqlite3.connect(self.folder / "auth.db")
        with contextlib.closing(beside), concurrent.futures.ThreadPoolExecutor(1) as pool:
            for sql, condition in [
                ("UPDATE user SET password = 'new'", {"password_hash": user.password_hash}),
                ("DELETE FROM auth_session", {"creator": creator}),
            ]:
                beside.cursor().execute("BEGIN")
                beside.cursor().execute(sql)
                added = pool.submit(self.store.add_session, session, **condition)
                with self.assertRaises(concurrent.futures.TimeoutError):  # it waits for the other transaction
                    added.result(0.2)
                beside.commit()
                self.assertFalse(added.result(30))
        self.assertEqual(self.sessions(), [])

    def test_disabled_user_is_refused_until_enabled(self):
        tokens = self.open_session()
        for _ in range(2):  # again changes nothing
            self.service.disable(self.store.find_user("alice"))
        self.assertEqual(self.store.find_user("alice").password_hash.count(server.DISABLED_PREFIX), 1)
        self.assert_ended(tokens)
        self.assert_ended({"access_token": self.token()}, time.time())  # a token without a session
        self.service.set_password(self.store.find_user("alice"), "battery staple")
        for password in ["correct horse", "battery staple"]:
            with self.assertRaises(server.InvalidCredentials):
                self.service.login("alice", password, NOW)
        for _ in range(2):
            self.service.enable(self.store.find_user("alice"))
        self.assertTrue(self.service.login("alice", "battery staple", NOW))

    def test_api_token_lives_until_it_expires_and_needs_a_live_creator(self):
        tokens, ttl = self.open_session(), 366 * 86400
        creator, api_token = self.identity(tokens), self.create_api_token(tokens, NOW, ttl)
        self.assertRegex(api_token["access_token"], r"^[\w-]{22}\.0\.[\w-]{43}$")
        caller, claims = self.service.authenticate(api_token["access_token"], NOW + ttl - 1)
        self.assertEqual((caller.username, caller.session.kind), ("alice", "api"))
        self.assertEqual((claims["identity"], claims["sid"]), (1, api_token["id"]))
        self.assert_ended(api_token, NOW + ttl)
        self.store.end_sessions(1, creator.session.id)
        with self.assertRaises(server.InvalidToken):
            self.service.create_api_token(creator, NOW, "", "late", 1000)
        with self.assertRaisesRegex(server.AuthError, "has no session"):
            self.service.create_api_token(server.Identity(1, "alice"), NOW, "", "more", 1000)

    def test_identity_has_the_roles_of_the_database_and_a_token_claims_them(self):
        tokens = self.open_session()
        self.assertNotIn("roles", self.service.authenticate(tokens["access_token"], NOW)[1])
        self.assertEqual(self.change_roles("admin", "editor"), "admin editor")
        self.assertEqual(self.identity(tokens).roles, {"admin", "editor"})
        refreshed = self.refresh(tokens, NOW + 1)
        for each in (self.open_session(), refreshed):
            self.assertEqual(self.service.authenticate(each["access_token"], NOW)[1]["roles"], ["admin", "editor"])
        other = self.another_service()
        other.change_roles(other.store.find_user("alice"), [], ["admin"])
        self.assertEqual(self.identity(refreshed).roles, {"editor"})  # at once, although the claim is older
        self.assertEqual(self.service.authenticate(self.token(), time.time())[0].roles, {"editor"})  # Flask-JWT's

    def test_api_token_has_only_roles_that_it_asked_for_and_its_user_still_has(self):
        self.change_roles("admin", "editor")
        tokens = self.open_session()
        plain, editor = self.create_api_token(tokens), self.create_api_token(tokens, roles=["editor"])
        self.assertEqual([self.identity(each).roles for each in (plain, editor)], [set(), {"editor"}])
        self.change_roles(remove=["editor"])
        self.assertEqual(self.identity(editor).roles, set())
        with self.assertRaisesRegex(server.Forbidden, "do not have the role editor"):
            self.create_api_token(tokens, roles=["admin", "editor"])

    def test_name_that_is_not_a_role_is_refused(self):
        for name in ["Admin", "a b", "a,b", "", "-a", ".a", "ä", "a\n", "x" * 65, None, 5, ["a"], {"a": 1}, b"a"]:
            with self.subTest(name), self.assertRaisesRegex(server.BadRequest, "is not a role"):
                self.change_roles(name)
        self.assertEqual(self.change_roles("0", "a.b_c-d", "x" * 64), f"0 a.b_c-d {'x' * 64}")
        with self.assertRaisesRegex(server.BadRequest, "longer than 1024"):
            self.change_roles(*(f"{number:064}" for number in range(15)))

    def test_plugin_of_another_app_refuses_credentials_of_a_deleted_session_or_user_at_once(self):
        def handler(identity, claims):
            claims.pop("sid", None)  # its own copy: the next request is checked as before
            return identity.username

        tokens, app = self.open_session(time.time()), bottle.Bottle()
        api_token = self.create_api_token(tokens, time.time())
        app.install(JWTPlugin(secret_key=SECRET, database=self.database))
        self.addCleanup(app.close)
        app.route("/", callback=handler)
        for end, token, error in [
            (lambda: self.store.end_sessions(1, api_token["id"]), api_token["access_token"], "Invalid token"),
            (lambda: self.store.end_sessions(1), tokens["access_token"], "Invalid token"),
            (lambda: self.store.delete_user(1), self.token(), "Invalid JWT"),
        ]:
            self.assertEqual(webtest.TestApp(app).get("/", headers=bearer(token)).text, "alice")
            end()
            self.assert_refused(webtest.TestApp(app).get("/", headers=bearer(token), status=401), 401, error)

    def test_stolen_database_gives_no_way_in(self):
        self.service = self.with_settings(login_limit=0)  # off: all attempts below are checked
        with self.assertLogs("auth", "DEBUG") as logged:
            tokens = self.refresh(self.open_session(label="curl/8", ip_address="192.0.2.1"), NOW + 1)
            api_token = self.create_api_token(tokens)
        self.assertNotIn("alice", str(self.raw_sql("SELECT id FROM auth_bucket")))  # people type passwords there
        texts = set(" ".join(logged.output).split())
        for table in ("user", "auth_user", "auth_session", "auth_bucket"):
            texts |= {str(value) for row in self.raw_sql(f"SELECT * FROM {table}") for value in row}
        for text in {part for each in texts for part in [each, *re.split(r"[$:]", each)]}:
            attempts = [text, f"{text}.2.{text}", f"{text}.0.{text}", f"{text}.2.", f"{text}.."]
            for attempt, use in itertools.product(attempts, [self.service.authenticate, self.service.refresh]):
                with self.assertRaises(server.AuthError):
                    use(attempt, NOW)
            with self.assertRaises(server.InvalidCredentials):
                self.service.login("alice", text, NOW)
        for secret in [tokens["refresh_token"], tokens["access_token"], api_token["access_token"]]:
            self.assertEqual([each for each in texts if secret.rpartition(".")[2] in each], [])


class SessionCacheTest(MySQLCase):  # SQLite needs no session_cache_ttl
    def setUp(self):
        super().setUp()
        self.settings = dataclasses.replace(self.settings, session_cache_ttl=60)
        self.add_user()

    def count_selects(self, tokens):
        sql = "SHOW GLOBAL STATUS LIKE 'Com_select'"
        before = mariadb.run(sql)
        self.identity(tokens)
        return int(mariadb.run(sql)[0][1]) - int(before[0][1])

    def test_authenticate_reads_user_and_session_in_one_query_and_only_if_not_cached(self):
        tokens, other = self.open_session(), self.open_session()
        self.change_roles("admin")
        self.identity(tokens)
        self.assertEqual([self.count_selects(each) for each in (tokens, other, tokens)], [0, 1, 0])
        self.assertEqual(self.identity(other).roles, {"admin"})
        self.service.logout(self.identity(other))
        self.assert_ended({"access_token": other["access_token"]})  # a commit of this process is seen at once
        self.assertEqual([self.count_selects(tokens), self.count_selects(tokens)], [1, 0])
        self.raw_sql("DELETE FROM auth_session")  # one of another process is seen after the ttl
        self.assertTrue(self.identity(tokens, NOW + 59))
        self.assert_ended(tokens, NOW + 60)

    def test_refresh_reads_the_row_although_another_process_has_rotated_it(self):
        other = self.another_service()
        first = self.open_session()
        self.assertTrue(self.identity(first))  # cached with counter 1
        second = other.refresh(first["refresh_token"], NOW + 1)
        third = self.service.refresh(second["refresh_token"], NOW + 2)
        self.assertTrue(other.authenticate(third["access_token"], NOW + 2))


class BucketTest(unittest.TestCase):
    def test_full_bucket_says_when_to_try_again(self):
        limits = {"full": (5, 300), "empty": (50, 72)}
        for expires_at, wait in [(NOW + 1500, 300), (NOW + 1201, 1), (NOW + 10**9, 300)]:  # the last: clock set back
            with self.subTest(expires_at), self.assertRaises(server.AuthError) as refused:
                server.charge_buckets({"full": expires_at}, limits, NOW)
            self.assertEqual(refused.exception.get_header("Retry-After"), str(wait))
        charged = server.charge_buckets({"full": NOW + 1200}, limits, NOW)
        self.assertEqual(charged, {"full": NOW + 1500, "empty": NOW + 72})

    def test_network_of_address_is_ipv4_or_the_64_bits_of_one_customer(self):
        networks = {"192.0.2.1": "192.0.2.1", "2001:db8:1:2:ffff::1": "2001:db8:1:2::/64", "::1": "::/64"}
        networks |= dict.fromkeys(["localhost", "", "x" * 100, "192.0.2.1, 192.0.2.2", "\ud800"], "unknown")
        self.assertEqual({address: server.network_of(address) for address in networks}, networks)


@on_each_engine
class ThrottleTest:
    HOME, AWAY = "192.0.2.1", "198.51.100.1"

    users = ("alice",)

    def attempt(self, now=NOW, password="wrong", username="alice", ip_address=AWAY, service=None):
        """Return the seconds to wait; 0 if the password was checked and wrong; None for a good login."""
        try:
            (service or self.service).login(username, password, now, ip_address=ip_address)
        except server.AuthError as refused:
            return int(refused.get_header("Retry-After", 0))

    def fail_from_many_addresses(self, number=50):
        waits = [self.attempt(ip_address=f"203.0.113.{last}") for last in range(number)]
        self.assertEqual(waits, [0] * number)

    def test_login_after_five_failures_is_checked_once_in_five_minutes(self):
        self.assertEqual([self.attempt() for _ in range(7)], [0, 0, 0, 0, 0, 300, 300])
        for now in range(NOW + 300, NOW + 1500, 300):
            self.assertEqual([self.attempt(now - 0.5), self.attempt(now), self.attempt(now)], [1, 0, 300])
        self.assertEqual([self.attempt(NOW + 1200 + 1500) for _ in range(6)], [0, 0, 0, 0, 0, 300])
        unknown = [self.attempt(username="nobody", ip_address=self.HOME) for _ in range(7)]
        self.assertEqual(unknown, [0, 0, 0, 0, 0, 300, 300])

    def test_right_password_is_refused_too_without_hashing(self):
        for _ in range(5):
            self.attempt()
        with count_iterations() as derive:
            self.assertEqual(self.attempt(password="correct horse"), 300)
        self.assertEqual(derive.spent(), 0)
        self.assertEqual(self.events("login_throttled")[0]["ip_address"], self.AWAY)
        self.assertIsNone(self.attempt(password="correct horse", ip_address=self.HOME))
        self.assertIsNone(self.attempt(NOW + 300, "correct horse"))

    def test_good_login_forgets_the_failures_of_that_user_at_that_address_only(self):
        for _ in range(12):
            self.assertEqual([self.attempt() for _ in range(4)], [0] * 4)
            self.assertIsNone(self.attempt(password="correct horse"))
        self.assertEqual([self.attempt(username="bob") for _ in range(3)], [0, 0, 72])  # 48 and 2 by one address

    def test_address_is_limited_over_all_usernames(self):
        for number in range(50):
            self.assertEqual(self.attempt(username=f"name{number}"), 0)
        self.assertEqual(self.attempt(password="correct horse"), 72)
        self.assertIsNone(self.attempt(password="correct horse", ip_address=self.HOME))
        self.assertIsNone(self.attempt(NOW + 72, "correct horse"))

    def test_username_is_limited_over_all_addresses_except_those_known_for_thirty_days(self):
        self.assertIsNone(self.attempt(NOW - 30 * 86400, "correct horse", ip_address=self.AWAY))
        self.assertIsNone(self.attempt(NOW - 29 * 86400, "correct horse", ip_address=self.HOME))
        for _ in range(3):  # failures at a known address do not count for the username
            self.assertEqual(self.attempt(ip_address=self.HOME), 0)
        self.fail_from_many_addresses()
        self.assertEqual(self.attempt(password="correct horse"), 72)
        self.assertIsNone(self.attempt(password="correct horse", ip_address=self.HOME))
        self.assertIsNone(self.attempt(NOW + 72, "correct horse"))

    def test_processes_share_the_limits_and_a_restart_forgets_nothing(self):
        other = self.another_service()
        for service in [self.service, other, self.service, other, self.service]:
            self.assertEqual(self.attempt(service=service), 0)
        self.assertEqual(self.attempt(service=self.another_service()), 300)

    def test_logins_at_once_do_not_exceed_a_limit(self):
        self.service = self.with_settings(login_limit=2)
        for change in [lambda number: {"ip_address": f"203.0.113.{number}"}, lambda number: {"username": str(number)}]:
            with self.subTest(), concurrent.futures.ThreadPoolExecutor(8) as pool:
                waits = list(pool.map(lambda number, change=change: self.attempt(**change(number)), range(40)))
                self.assertEqual(sorted(waits), [0] * 20 + [72] * 20)

    def test_login_that_the_database_fails_does_not_count_as_failure(self):
        self.raw_sql("ALTER TABLE auth_session RENAME TO away")
        for _ in range(6):
            self.assertRaises(server.Unavailable, self.service.login, "alice", "correct horse", NOW)
        self.raw_sql("ALTER TABLE away RENAME TO auth_session")
        self.assertEqual([self.attempt() for _ in range(6)], [0, 0, 0, 0, 0, 300])

    def test_input_that_is_not_text_does_not_count_as_failure(self):
        for username, password in [("alice", 5), ("alice", ""), (0, "wrong")] * 3:
            self.assertEqual(self.attempt(username=username, password=password), 0)
        self.assertIsNone(self.attempt(password="correct horse"))

    def test_enable_forgets_the_failures_of_the_username(self):
        for _ in range(5):
            self.attempt()
        self.fail_from_many_addresses(45)
        self.assertEqual(self.attempt(ip_address=self.HOME), 72)
        self.service.enable(self.store.find_user("alice"))
        self.assertEqual([self.attempt(), self.attempt(ip_address=self.HOME)], [0, 0])

    def test_expired_buckets_and_sessions_are_deleted_with_each_login(self):
        self.service = self.with_settings(session_idle_timeout=1)
        for number in range(30):
            ip_address = f"2001:db8:{number:x}::1"
            self.assertEqual(self.attempt(NOW + 300 * number, username=f"name{number}", ip_address=ip_address), 0)
        self.assertLess(self.raw_sql("SELECT COUNT(*) FROM auth_bucket")[0][0], 10)  # 90 were made
        for second in range(9):
            self.assertIsNone(self.attempt(NOW + 9000 + second, "correct horse"))
        self.assertLess(len(self.sessions()), 3)


@on_each_engine
class HashLimiterTest:
    users = ("alice",)

    def test_good_logins_at_once_of_one_user_and_address_all_succeed(self):
        with mock.patch.object(server.HashLimiter, "CORES", 20):
            self.service = self.with_settings(threads=40, pbkdf2_iterations=30_000)
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            tokens = pool.map(lambda _: self.open_session(time.time(), ip_address="192.0.2.1"), range(20))
            self.assertEqual(len({each["refresh_token"] for each in tokens}), 20)

    def test_logins_above_the_limit_are_refused_at_once_while_tokens_are_still_checked(self):
        self.service = self.with_settings(threads=6)
        token, limiter, numbers = self.login(), self.service.limiter, []
        limiter.on_change = numbers.append
        self.assertEqual(limiter.limit, 3)  # half of the threads
        with concurrent.futures.ThreadPoolExecutor(3) as pool, contextlib.ExitStack() as cores:
            while limiter.core.acquire(blocking=False):
                cores.callback(limiter.core.release)
            logins = [pool.submit(self.open_session, time.time()) for _ in range(3)]
            wait_for(lambda: limiter.logins == 3)
            for _ in range(9):  # these are not charged
                answer = self.client.post_json("/auth", {"username": "alice", "password": "x"}, status=503)
                self.assert_refused(answer, 503, "Service Unavailable", "Too many logins at once; try again")
                self.assertEqual(answer.headers["Retry-After"], "1")
            self.get("/rest-auth", token)
            self.assertEqual([login.done() for login in logins], [False] * 3)
        self.assertTrue(all(login.result()["access_token"] for login in logins))
        self.assertEqual((max(numbers), numbers[-1], limiter.logins), (3, 0, 0))
        self.login()


BAD_NAMES = [  # not a new username, and nobody can log in with one
    *("", " ", " alice", "alice ", "alice\t", "\u00a0alice", "al\0ice", "al\nice", "al\x85ice", "\ud800", "x" * 256),
    *(None, 0, 1, -1.5, True, False, [], ["alice"], {}, {"$ne": ""}, 2**70),
]


class NewUserTest(Case):
    def test_username_or_password_that_breaks_a_rule_is_refused_with_that_rule(self):
        for usernames, passwords, words in [
            (BAD_NAMES, ["correct horse"], "^username must have 1 to 255 characters, no control"),
            (["Alice.Liddell"], ["", "seven77", "x" * 1025, None, 5, "\ud800" * 8], "must have 8 to 1024 characters"),
            (["Alice.Liddell"], ["alice.liddell", "ALICE.LIDDELL"], "must not be the username"),
            (["Alice.Liddell"], ["password", "PASSWORD123", "12345678", "qwertyuiop"], "one of the most common"),
        ]:
            for username, password in itertools.product(usernames, passwords):
                with self.subTest(username, password=password), self.assertRaisesRegex(server.BadRequest, words):
                    self.service.add_user(username, password)
        self.assertEqual(list(self.store.iter_users()), [])
        for username, password in [("a", "eight888"), ("x" * 255, "x" * 1024), ("álice 😀", "пароль пароль")]:
            self.service.add_user(username, password)
            self.assertTrue(self.service.login(username, password, NOW))
        self.assertEqual([password for password in server.COMMON_PASSWORDS if len(password) < 8], [])


# --- Plugin ---


class PluginTest(Case):
    def protected_app(self, *plugins, **settings):
        app = bottle.Bottle()
        for plugin in [*plugins, JWTPlugin(**settings or {"secret_key": SECRET})]:
            app.install(plugin)
        self.addCleanup(app.close)
        return app, webtest.TestApp(app)

    def test_route_without_public_true_is_closed(self):
        app, client = self.protected_app()
        app.route("/open", callback=lambda: "in", public=True)
        self.assertEqual(client.get("/open").text, "in")
        app.route("/plain", callback=lambda: "in")
        app.route("/any", "ANY", callback=lambda: "in")
        app.route("/wrapped", callback=(lambda callback: lambda *args, **values: callback())(lambda: "in"))
        for path, value in {"/string": "True", "/one": 1, "/false": False}.items():
            app.route(path, callback=lambda: "in", public=value)
        app.config["public"] = True  # the configuration of the app opens nothing
        app.route("/later", callback=lambda: "in")
        for path in ["/plain", "/any", "/wrapped", "/string", "/one", "/false", "/later"]:
            with self.subTest(path):
                self.assert_refused(client.get(path, status=401), 401, "Authorization Required")
                self.assertEqual(client.get(path, headers=bearer(self.token())).text, "in")

    def test_route_that_would_skip_the_plugin_is_refused_when_declared(self):
        child, (own, client) = bottle.Bottle(), self.protected_app()
        child.route("/x", callback=lambda: "come-in")
        [plugin] = [plugin for plugin in own.plugins if isinstance(plugin, JWTPlugin)]
        route = functools.partial(bottle.Bottle.route, path="/a", callback=lambda: "come-in")
        for declare in [
            *(functools.partial(route, skip=skip) for skip in [True, ["x", True], [plugin], [JWTPlugin]]),
            lambda app: app.mount("/b/", child),
            lambda app: app.merge(child),
            lambda app: app.mount("/c/", lambda environ, start: [b"come-in"]),
        ]:
            with self.assertRaisesRegex(bottle.PluginError, "would skip JWTPlugin"):
                declare(own)
            declared_before = bottle.Bottle()
            declare(declared_before)
            with self.assertRaisesRegex(bottle.PluginError, "would skip JWTPlugin"):
                declared_before.install(plugin)
        for path in ["/a", "/b/x", "/x", "/c/"]:
            self.assertNotIn("come-in", client.get(path, status="*").text, path)

    def test_declaration_that_contradicts_itself_is_refused(self):
        app, _ = self.protected_app()
        for rule, declaration, words in [
            *((rule, {}, "from the path") for rule in ["/<identity>", "/x/<claims:re:.*>", "/:identity"]),
            ("/", {"callback": lambda identity: "in", "public": True}, "public, so it has no identity"),
            ("/", {"role": "admin", "public": True}, "public, so it has no role"),
            *(
                ("/", {name: "x"}, f"says {name}=")
                for name in ["roles", "Role", "rol", "rolse", "group", "scope", "perm"]
            ),
            *(("/", {"role": role}, "is not a role") for role in ["Admin", "", None, True, 5, ("a", 5), "a b"]),
            *(("/", {"role": role}, "role is empty") for role in [(), []]),
            ("/", {"role": "admin"}, "JWTPlugin knows none; give it `database` or `roles_claim`"),
        ]:
            with self.subTest(rule, **declaration), self.assertRaisesRegex(bottle.PluginError, words):
                app.route(rule, **{"callback": lambda **values: str(values)} | declaration)

    def test_route_with_a_role_is_for_users_who_have_one_of_its_roles(self):
        self.add_user()
        app = self.app
        app.delete("/x", callback=lambda: "done", role="admin")
        app.get("/y", callback=lambda identity: {"roles": sorted(identity.roles)}, role=("admin", "editor"))
        names = ("REMOTE_USER", "HTTP_REMOTE_USER", "HTTP_REMOTE_GROUPS")

        def mounted(environ, start_response):
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [repr([environ.get(name) for name in names]).encode()]

        app.mount("/z/", mounted, skip=None, role="editor")
        app.mount("/open/", mounted, skip=None, public=True)
        tokens = self.log_in()
        for route in ["DELETE /x", "GET /y", "GET /z/a"]:
            self.assert_refused(self.call(route, status=401), 401, "Authorization Required")
            answer = self.call(route, token=tokens, status=403)
            self.assert_refused(answer, 403, "Forbidden")
        self.assert_refused(
            self.call("GET /y", token=tokens, status=403), 403, "Forbidden", "This needs the role admin or editor"
        )
        answer = self.call("DELETE /x", token=tokens, status=403)
        challenge = 'Bearer realm="Login Required", error="insufficient_scope", scope="admin"'
        self.assertEqual(answer.headers.getall("WWW-Authenticate"), [challenge])
        self.change_roles("editor")
        self.call("DELETE /x", token=tokens, status=403)
        self.assertEqual(self.call("GET /y", token=tokens).json, {"roles": ["editor"]})
        forged = dict.fromkeys(["Remote-User", "Remote-Groups"], "root") | bearer(tokens["access_token"])
        answer = self.client.get("/z/a", headers=forged, extra_environ={"REMOTE_USER": "root"})
        self.assertEqual(answer.text, "['alice', None, None]")
        answer = self.client.get("/open/a", headers=forged, extra_environ={"REMOTE_USER": "root"})
        self.assertEqual(answer.text, "[None, None, None]")
        self.another_service().change_roles(self.store.find_user("alice"), ["admin"], ["editor"])
        self.assertEqual(self.call("DELETE /x", token=tokens).text, "done")
        self.call("GET /z/a", token=tokens, status=403)

    def test_plugin_with_keys_alone_takes_roles_from_the_claim_that_it_was_told(self):
        app, client = self.protected_app(secret_key=SECRET, roles_claim="groups")
        app.get("/", callback=lambda: "in", role="admin")
        for groups, status in [
            (["admin"], 200),
            (["x", 5, "admin"], 200),
            ("admin", 403),
            ({"admin": 1}, 403),
            ([], 403),
        ]:
            client.get("/", headers=bearer(self.token(groups=groups)), status=status)
        client.get("/", headers=bearer(self.token(roles=["admin"])), status=403)

    def test_plugin_is_outermost_and_a_cache_answers_nothing_without_token(self):
        cache = functools.lru_cache  # as a plugin, it answers a path again with its first answer
        same_name = type("Other", (), {"name": "jwt", "__call__": lambda self, callback: cache(callback)})()
        for before, after, of_route in [([cache], [], []), ([], [cache], []), ([], [same_name], [same_name])]:
            app, client = self.protected_app(*before, secret_key=SECRET, realm="The shed")
            for plugin in after:
                app.install(plugin)
            app.route("/", callback=lambda: "secret", apply=of_route)
            with self.subTest(before=before, after=after):
                self.assertEqual(client.get("/", headers=bearer(self.token())).text, "secret")
                answer = client.get("/", status=401)
                self.assert_refused(answer, 401, "Authorization Required")
                self.assertEqual(answer.headers.getall("WWW-Authenticate")[0], 'JWT realm="The shed"')
        with self.assertRaisesRegex(bottle.PluginError, "has a JWTPlugin already"):
            app.install(JWTPlugin(secret_key=SECRET))

    def test_handler_gets_identity_and_claims_by_name(self):
        app, client = self.protected_app()
        wrapper = functools.wraps(lambda claims: None)(lambda **values: {"jti": values["claims"]["jti"]})
        app.route("/claims", callback=wrapper)
        app.route("/identity", callback=lambda identity: {"id": identity.id, "name": identity.username})
        app.route("/nested", callback=lambda claims: claims["nested"].append(1) or str(claims["nested"]))
        nested = bearer(self.token(nested=[0]))
        self.assertEqual([client.get("/nested", headers=nested).text for _ in range(2)], ["[0, 1]"] * 2)
        app.route("/both/<word>", callback=lambda word, identity, claims: {"all": [word, identity.id, claims["jti"]]})
        expected = {"identity": {"id": 1, "name": None}, "claims": {"jti": "x"}, "both/w": {"all": ["w", 1, "x"]}}
        for path, answer in expected.items():
            headers = {"Authorization": f"bEaReR  {self.token(jti='x')}"}
            self.assertEqual(client.get(f"/{path}", headers=headers).json, answer)

    def test_plugin_with_weak_or_missing_key_or_two_sources_of_keys_is_refused(self):
        for settings, words in [
            *(({"secret_key": secret}, "^secret_key") for secret in ["secret-key", "x" * 31]),
            ({"key_file": f"{self.folder}/no.keys"}, "the service makes it at its first start"),
            ({"jwks_url": "http://127.0.0.1/", "secret_key": SECRET}, "jwks_url replaces"),
            ({"secret_key": SECRET, "database": f"sqlite:///{self.folder}/no.db"}, "no.db does not exist"),
            ({"service": self.settings}, "takes the settings as keywords"),
            *(({"jwks_url": url}, "only 'http' and 'https'") for url in ["file:///etc/passwd", "jwks.json"]),
        ]:
            with self.subTest(settings), self.assertRaisesRegex((ConfigError, jwt.PyJWKClientError), words):
                JWTPlugin(**settings)

    def test_plugin_without_database_refuses_what_nothing_could_end(self):
        self.add_user()
        tokens, (app, client) = self.open_session(time.time()), self.protected_app()
        app.route("/", callback=lambda: "in")
        client.get("/", headers=bearer(tokens["access_token"]))
        for token, words in [
            (self.create_api_token(tokens, time.time())["access_token"], "An API token needs the database"),
            (self.token(exp=int(time.time()) + 3600), "must not live longer than access_"),
            (tokens["refresh_token"], ""),
        ]:
            answer = client.get("/", headers=bearer(token), status=401)
            self.assert_refused(answer, 401, "Invalid token")
            self.assertIn(words, answer.json["description"])

    def test_service_can_be_mounted_and_merged(self):
        self.add_user()
        for prefix, join in [("/api", lambda root, app: root.mount("/api/", app)), ("", bottle.Bottle.merge)]:
            root = bottle.Bottle()
            join(root, make_app(self.settings, self.service))
            client, path = webtest.TestApp(root), f"{prefix}/auth/me"
            with self.subTest(prefix):
                self.assertEqual(client.get(path, headers=bearer(self.login())).json["username"], "alice")
                self.assert_refused(client.get(path, status=401), 401, "Authorization Required")
                answer = client.post(f"{prefix}/auth", "x", {"Content-Type": "text/plain"}, status=400)
                self.assert_refused(answer, 400, "Bad Request")


class MiddlewareTest(Case):
    users = ("alice",)

    def setUp(self):
        super().setUp()
        self.tokens, self.seen = self.log_in(), {}

    def protect(self, **options):
        def app(environ, start_response):
            self.seen = dict(environ)
            start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")])
            return [b"" if environ["REQUEST_METHOD"] == "HEAD" else b"in"]

        middleware = server.JWTMiddleware(app, self.settings, **options)
        self.addCleanup(middleware.service.store.close)
        return webtest.TestApp(middleware)

    def test_app_is_closed_and_learns_who_calls(self):
        client, headers = self.protect(), bearer(self.tokens["access_token"])
        for method in ["GET", "POST", "HEAD", "OPTIONS"]:
            answer = client.request("/x", method=method, status=401)
            self.assertEqual((answer.text == "", self.seen), (method == "HEAD", {}))
        self.assert_refused(client.get("/x", status=401), 401, "Authorization Required")
        self.assert_challenged(client.get("/x", headers=bearer("x"), status=401), "Invalid token")
        forged = {"Remote-User": "root", "Remote_User": "root", "Remote-Groups": "admin"}
        environ = {"REMOTE_USER": "root", "auth.identity": "root"}
        self.assertEqual(client.post("/x", headers=headers | forged, extra_environ=environ).text, "in")
        self.assertEqual((self.seen["REMOTE_USER"], self.seen["auth.identity"].id), ("alice", 1))
        self.assertNotRegex(str([*self.seen.items()]), "'root'|HTTP_REMOTE")
        self.call("POST /auth/logout", token=self.tokens)
        self.assert_refused(client.get("/x", headers=headers, status=401), 401, "Invalid token", "Session has ended")

    def test_public_paths_are_open_and_no_other(self):
        client = self.protect(public=["/", "/about", "/static/"])
        for path in ["/", "/about", "/static/", "/static/a/b.css", "/static/.well-known", "/static/a..b"]:
            client.get(path, headers={"Remote-User": "root"}, extra_environ={"REMOTE_USER": "root"})
            self.assertNotIn("root", str(self.seen), path)
        paths = ["/static", "/statica", "/about/", "/about/x", "/Static/x", "/static/../x", "/static/..", "/static/./x"]
        for path in [
            *paths,
            "/static//x",
            "//static/x",
            "/static/..%2fx",
            "/static/%2e%2e/x",
            "/static/..%5cx",
            "/x/static/",
        ]:
            self.assert_refused(client.get(path, status=401), 401, "Authorization Required")
        for public in ["/static/", ["static/"], [""]]:
            with self.subTest(public), self.assertRaisesRegex(ConfigError, "public is a list of paths"):
                self.protect(public=public)

    def test_role_and_read_only_token_are_checked(self):
        client, headers = self.protect(role=("admin", "editor")), bearer(self.tokens["access_token"])
        answer = client.get("/", headers=headers, status=403)
        self.assert_refused(answer, 403, "Forbidden", "This needs the role admin or editor")
        self.assertIn('error="insufficient_scope", scope="admin editor"', answer.headers["WWW-Authenticate"])
        self.change_roles("editor")
        client.get("/", headers=headers)
        fields = {"roles": ["editor"], "read_only": True}
        reader = bearer(self.create_api_token(self.tokens, time.time(), **fields)["access_token"])
        for method, status in {"GET": 200, "HEAD": 200, "POST": 403, "DELETE": 403, "OPTIONS": 403}.items():
            client.request("/", method=method, headers=reader, status=status)
        for role in ["Admin", None, "", 5]:
            self.assertRaises(server.BadRequest, self.protect, role=role)
        for role in [(), [], frozenset()]:
            self.assertRaisesRegex(ConfigError, "role is empty", self.protect, role=role)

    def test_odd_username_of_an_old_table_is_refused(self):
        client = self.protect()
        for username in ["bob ", "b\r\nRemote-User: root", ""]:
            self.raw_sql("UPDATE user SET username = %s", username)
            answer = client.get("/", headers=bearer(self.tokens["access_token"]), status=400)
            self.assert_refused(answer, 400, "Bad Request")
        self.assertEqual(self.seen, {})

    def test_missing_database_or_keys_stop_the_start_and_a_broken_one_is_503(self):
        client = self.protect()
        self.store.close()
        (self.folder / "auth.db").write_bytes(b"x" * 5000)
        answer = client.get("/", headers=bearer(self.tokens["access_token"]), status=503)
        self.assert_refused(answer, 503, "Service Unavailable")
        self.settings = Settings(database=self.database, key_file=f"{self.folder}/no.keys")
        self.assertRaisesRegex(ConfigError, "no.keys", self.protect)
        self.settings = Settings(database=f"sqlite:///{self.folder}/no.db", secret_key=SECRET)
        self.assertRaisesRegex(ConfigError, "no.db does not exist", self.protect)


class RemoteKeysTest(Case):
    """An app on another host: no database, no secret, only the published keys."""

    def setUp(self):
        super().setUp()
        path = str(self.folder / "auth.keys")
        with server.edit_key_file(path) as jwks:
            jwks += [server.new_jwk("ES256"), server.new_jwk("HS256")]
        self.settings = dataclasses.replace(self.settings, secret_key="", key_file=path)
        self.add_user()
        self.tokens = self.open_session(time.time())

    @contextlib.contextmanager
    def issuer(self, app, port=0):
        quiet = type("Handler", (simple_server.WSGIRequestHandler,), {"log_message": lambda *_: None})
        running = simple_server.make_server("127.0.0.1", port, app, handler_class=quiet)
        with running, concurrent.futures.ThreadPoolExecutor(1) as pool:
            pool.submit(running.serve_forever, 0.01)
            try:
                yield running.server_port
            finally:
                running.shutdown()

    def client_of_other_host(self, port, **settings):
        app, url = bottle.Bottle(), f"http://127.0.0.1:{port}/.well-known/jwks.json"
        self.plugin = JWTPlugin(jwks_url=url, **settings)
        app.install(self.plugin)
        self.addCleanup(app.close)
        app.route("/", callback=lambda identity: {"id": identity.id, "username": identity.username})
        return webtest.TestApp(app)

    def ask(self, client, token, status=200):
        return client.get("/", headers=bearer(token), status=status)

    def test_published_keys_suffice_also_when_the_issuer_stops(self):
        token = self.tokens["access_token"]
        api_token = self.create_api_token(self.tokens, time.time())["access_token"]
        with self.issuer(self.app) as port:
            client = self.client_of_other_host(port)
            answer = self.client.get("/.well-known/jwks.json")
            self.assertEqual(answer.headers["Cache-Control"], "public, max-age=600")
            [key] = answer.json["keys"]  # HS256 keys are secret
            self.assertEqual((key["alg"], key["use"], "d" in key), ("ES256", "sig", False))
            self.assertEqual(self.ask(client, token).json, {"id": 1, "username": None})
            self.assert_refused(client.get("/", status=401), 401, "Authorization Required")
            for bad in ["x", self.token(), self.tokens["refresh_token"], token[:-3] + "AAA"]:
                self.assert_refused(self.ask(client, bad, 401), 401, "Invalid token")
            for settings in [{}, {"database": self.database}]:
                answer = self.ask(self.client_of_other_host(port, **settings), api_token, 401)
                self.assert_refused(answer, 401, "Invalid token")
                self.assertRegex(
                    answer.json["description"], "^An API token needs the database and the keys of the service; log in"
                )
        self.ask(client, token)

    def test_failed_fetch_answers_503_and_heals(self):
        port, token = free_port(), self.tokens["access_token"]
        client, words = self.client_of_other_host(port), "The public keys of the issuer cannot be fetched; try again"
        for _ in range(2):
            answer = self.ask(client, token, 503)
            self.assert_refused(answer, 503, "Service Unavailable", words)
            self.assertIn("Retry-After", answer.headers)
        self.assertEqual(len(self.events("jwks_error")), 1)
        with self.issuer(self.app, port):
            self.ask(client, token, 503)
            self.plugin.service.keys.retry_at = 0  # instead of waiting two seconds
            self.ask(client, token)

    def test_answer_without_public_keys_is_503_or_401(self):
        jwk, now = server.new_jwk("HS256"), int(time.time())
        token = KeySet([server.Key.from_jwk(jwk)]).sign({"exp": now + 99, "iat": now, "nbf": now, "identity": 1})
        bodies = dict.fromkeys(["", "x", "[]", "{}", '{"keys": []}', '{"keys": [{"kty": "x"}]}'], 503)
        bodies[json.dumps({"keys": [jwk]})] = 401  # a symmetric key that is published verifies nothing
        for body, status in bodies.items():
            EVENTS.clear()
            app = bottle.Bottle()
            app.route("/.well-known/jwks.json", callback=lambda body=body: body)
            with self.subTest(body), self.issuer(app) as port:
                answer = self.ask(self.client_of_other_host(port), token, status)
                self.assert_refused(answer, status, {503: "Service Unavailable", 401: "Invalid token"}[status])
                advice = [event for event in self.events("jwks_error") if "key rotate --alg ES256" in str(event)]
                self.assertEqual(len(advice), int(status == 503))


# --- HTTP API ---


@on_each_engine
class WireTest:
    users = ("alice",)

    def setUp(self):
        super().setUp()
        self.tokens = self.log_in()

    def test_auth_and_refresh_take_json_and_forms_and_answer_tokens(self):
        fields = {"username": "alice", "password": "correct horse", "remember": "ignored"}
        for route, form in itertools.product(["POST /auth", "POST /auth/refresh"], [False, True]):
            answer = self.call(route, fields, form=form)
            expected = {"access_token": mock.ANY, "token_type": "Bearer", "expires_in": 300, "refresh_token": mock.ANY}
            self.assertEqual([*answer.json.items()], [*expected.items()])
            self.assertEqual((answer.headers["Cache-Control"], answer.content_type), ("no-store", "application/json"))
            fields["refresh_token"] = answer.json["refresh_token"]
            for scheme in ["JWT", "jwt", "Bearer", "BEARER"]:
                headers = {"Authorization": f"{scheme} {answer.json['access_token']}"}
                greeting = self.client.get("/rest-auth", headers=headers).json
                self.assertEqual(greeting, "You are an authenticate person to see this message")

    def test_refusal_of_a_token_is_the_row_of_the_error_table(self):
        token = self.tokens["access_token"]
        sid = self.get("/auth/me", token).json["session"]["id"]  # of alice, not of user 99
        two_lines = f"JWT {token}, JWT {token}"  # as a server joins two Authorization lines
        for error, description, headers in [
            ("Authorization Required", "Request does not contain an access token", ["", " "]),
            ("Invalid JWT header", "Unsupported authorization type", [f"Basic {token}", token, f"JWT\t{token}"]),
            ("Invalid JWT header", "Unsupported authorization type", [f"JWT\xa0{token}"]),
            ("Invalid JWT header", "Token missing", ["JWT", "Bearer "]),
            ("Invalid JWT header", "Token contains spaces", [f"JWT {token} x", two_lines]),
            ("Invalid token", "Not enough segments", ["JWT x"]),
            ("Invalid token", "Signature verification failed", [f"JWT {self.token(secret='x' * 32)}"]),
            ("Invalid token", "Signature has expired", [f"JWT {self.token(exp=1)}"]),
            ("Invalid token", "Session has ended", [f"JWT {self.token(sid='A' * 22)}"]),
            ("Invalid token", "Session has ended", [f"JWT {self.token(sid=sid, identity=99)}"]),
            ("Invalid JWT", "User does not exist", [f"JWT {self.token(identity=99)}"]),
        ]:
            for header in headers:
                with self.subTest(header):
                    answer = self.client.get("/rest-auth", headers={"Authorization": header}, status=401)
                    self.assert_refused(answer, 401, error, description)
                    self.assert_challenged(answer, error)

    def test_without_database_every_route_answers_503_with_retry_after(self):
        self.assertEqual(self.client.get("/health").json, {"status": "ok"})
        self.store.close()
        if isinstance(self, MySQLCase):
            mariadb.run(f"DROP DATABASE {self.name}")
        else:
            os.unlink(self.folder / "auth.db")
            os.mkdir(self.folder / "auth.db")
        fields = {"username": "alice", "password": "correct horse", **self.tokens}
        for route in ["GET /health", "GET /rest-auth", "POST /auth", "POST /auth/refresh"]:
            answer = self.call(route, fields, self.tokens, status=503)
            self.assert_refused(answer, 503, "Service Unavailable", "The database does not answer; try again")
            self.assertGreater(int(answer.headers["Retry-After"]), 0)

    def assert_usable(self, tokens, status):
        fields = {"refresh_token": tokens["refresh_token"]}
        for route in ["GET /rest-auth", "POST /auth/refresh"]:
            answer = self.call(route, fields, tokens, status=status)
            if status == 401:
                self.assert_refused(answer, 401, "Invalid token", "Session has ended")
                self.assert_challenged(answer, "Invalid token")

    def test_logout_ends_sessions_of_its_scope(self):
        self.add_user("bob")
        bob = self.log_in("bob")
        for scope, own_status, other_status in [("local", 401, 200), ("others", 200, 401), ("global", 401, 401)]:
            own, other = self.log_in(), self.log_in()
            answer = self.call("POST /auth/logout", {"scope": scope}, own, form=scope == "others")
            self.assertEqual((answer.status_int, answer.text), (204, ""))
            for tokens, status in [(own, own_status), (other, other_status), (bob, 200)]:
                with self.subTest(scope, status=status):
                    self.assert_usable(tokens, status)
        foreign = {"access_token": self.token()}  # of another program that has the key: it has no session
        self.assert_refused(self.call("POST /auth/logout", token=foreign, status=400), 400, "Bad Request")
        tokens = self.log_in()
        self.call("POST /auth/logout", {"scope": "global"}, foreign)
        self.assert_usable(tokens, 401)

    def test_password_change_ends_all_other_sessions(self):
        other, fields = self.log_in(), {"current_password": "correct horse", "new_password": "battery staple"}
        self.assertEqual(self.call("PUT /auth/password", fields, self.tokens).status_int, 204)
        self.assert_usable(self.tokens, 200)
        self.assert_usable(other, 401)
        self.log_in(status=401)
        self.log_in("alice", "battery staple")

    def test_sessions_are_shown_and_ended_one_by_one(self):
        options = {"headers": {"User-Agent": "x" * 300}, "extra_environ": {"REMOTE_ADDR": "192.0.2.7"}}
        other = self.client.post_json("/auth", {"username": "alice", "password": "correct horse"}, **options).json
        me, now = self.call("GET /auth/me", token=other).json, time.time()
        session, created_at = me["session"], me["session"]["created_at"]
        self.assertEqual(me, {"id": 1, "username": "alice", "roles": [], "session": session})
        values = {"id": session["id"], "kind": "login", "label": "x" * 255, "ip_address": "192.0.2.7"}
        times = {"created_at": created_at, "last_used_at": created_at, "expires_at": created_at + 30 * 86400}
        self.assertEqual([*session.items()], [*values.items(), *times.items(), ("current", True)])
        self.assertTrue(now - 30 < created_at <= now)
        self.assertIsNone(self.get("/auth/me", self.token()).json["session"])
        listed = self.call("GET /auth/sessions", token=self.tokens).json
        self.assertEqual([each["current"] for each in listed if each["id"] == session["id"]], [False])
        self.assertEqual(len(listed), 2)
        self.add_user("bob")
        bob = self.log_in("bob")
        [session_of_bob] = self.call("GET /auth/sessions", token=bob).json
        for sid in [session_of_bob["id"], "A" * 22, "x", "'", "A" * 21, "%00", "%F0%9F%98%80", "A" * 5000]:
            with self.subTest(sid[:30]):
                answer = self.call(f"DELETE /auth/sessions/{sid}", token=self.tokens, status=404)
                self.assert_refused(answer, 404, "Not Found", "There is no such session")
        for status in (204, 404):
            self.call(f"DELETE /auth/sessions/{session['id']}", token=self.tokens, status=status)
        for tokens, status in [(self.tokens, 200), (other, 401), (bob, 200)]:
            self.assert_usable(tokens, status)

    def test_api_token_is_created_used_and_deleted(self):
        answer = self.call("POST /auth/tokens", {"name": "backup"}, self.tokens, status=201)
        self.assertEqual(
            list(answer.json), ["access_token", "token_type", "expires_in", "id", "name", "roles", "read_only"]
        )
        self.assertEqual((answer.json["expires_in"], answer.headers["Cache-Control"]), (90 * 86400, "no-store"))
        for expires_in, form in [(607, False), (607.0, False), ("607", True)]:
            fields = {"name": "cron", "expires_in": expires_in}
            api_token = self.call("POST /auth/tokens", fields, self.tokens, form=form, status=201).json
            self.assertEqual(repr(api_token["expires_in"]), "607")
        listed = self.call("GET /auth/sessions", token=api_token).json
        self.assertEqual(sorted(each["label"] for each in listed if each["kind"] == "api"), ["backup"] + ["cron"] * 3)
        self.assertEqual([(each["roles"], each["read_only"]) for each in listed if "roles" in each], [([], False)] * 4)
        for route, fields in {
            "POST /auth/tokens": {"name": "x"},
            "PUT /auth/password": {"current_password": "correct horse", "new_password": "battery staple"},
            "POST /auth/logout": {"scope": "global"},
            f"DELETE /auth/sessions/{answer.json['id']}": None,
        }.items():
            refused = self.call(route, fields, api_token, status=403)
            self.assert_refused(refused, 403, "Forbidden", "Only a login can do this, not an API token")
        self.call(f"DELETE /auth/sessions/{api_token['id']}", token=self.tokens, status=204)
        refused = self.call("GET /rest-auth", token=api_token, status=401)
        self.assert_refused(refused, 401, "Invalid token", "Session has ended")

    def basic(self, username, password):
        return {"Authorization": f"Basic {base64.b64encode(f'{username}:{password}'.encode()).decode()}"}

    def test_check_tells_a_proxy_who_calls(self):
        self.change_roles("admin", "editor")
        fields = {"name": "git", "roles": "editor admin"}
        api_token = self.call("POST /auth/tokens", fields, self.tokens, form=True, status=201).json
        credentials = [bearer(self.tokens["access_token"]), bearer(api_token["access_token"])]
        credentials += [self.basic("alice", api_token["access_token"])]
        for headers, query in itertools.product(credentials, ["", "?role=admin", "?role=x&role=editor"]):
            forged = {"Remote-User": "root", "Remote-Groups": "wheel", "X-Original-URL": "/x", "X-Forwarded-Uri": "/x"}
            for method in ["GET", "HEAD"]:
                answer = self.client.request(f"/auth/check{query}", method=method, headers=headers | forged)
                found = [answer.headers.get(name) for name in ("Remote-User", "Remote-Groups", "Cache-Control")]
                self.assertEqual([answer.body, *found], [b"", "alice", "admin,editor", "no-store"])
        for query, status in [("?role=x", 403), ("?role=x&role=y", 403), ("?rolle=admin", 400), ("?role=", 400)]:
            answer = self.get(f"/auth/check{query}", self.tokens["access_token"], status=status)
            self.assert_refused(answer, status, {400: "Bad Request", 403: "Forbidden"}[status])
        for query in [
            "?role=Admin",
            "?role=admin,editor",
            "?role=admin%20editor",
            "?role",
            "?",
            "?x",
            "?role=admin&x=1",
        ]:
            status = 200 if query == "?" else 400
            self.get(f"/auth/check{query}", self.tokens["access_token"], status=status)
        self.client.post("/auth/check", headers=credentials[0], status=405)
        self.call(f"DELETE /auth/sessions/{api_token['id']}", token=self.tokens)
        for headers in credentials[1:]:
            self.client.get("/auth/check", headers=headers, status=401)

    def test_check_sends_an_unusual_username_as_utf_8_and_refuses_one_that_is_not_safe_in_a_header(self):
        self.add_user('Ж"ö')
        token = self.log_in('Ж"ö')["access_token"]
        answer = self.get("/auth/check", token)
        self.assertEqual(answer.headers["Remote-User"].encode("latin-1").decode(), 'Ж"ö')
        self.assertEqual(answer.headers["Remote-Groups"], "")
        for name in ["bob ", "b\rob", "b\nRemote-User: root", "\x7f"]:
            with self.subTest(name):
                self.raw_sql("UPDATE user SET username = %s WHERE id = 2", name)
                self.store.close()
                answer = self.get("/auth/check", token, status=400)
                self.assertNotIn("Remote-User", answer.headers)

    def test_basic_takes_an_api_token_of_this_username_at_the_check_alone_and_costs_no_hash(self):
        token = self.create_api_token(self.tokens, time.time())["access_token"]
        self.add_user("bob")
        parts = ["alice", ":", token]
        bad = [
            self.basic("alice", password) for password in ["correct horse", "", "x" * 10_000, token + "x", token[:-1]]
        ]
        bad += [self.basic("alice", self.tokens[name]) for name in ("access_token", "refresh_token")]
        bad += [self.basic(username, token) for username in ("bob", "", "Alice", "alice ", "nobody")]
        for text in ["", "x", "====", "!", "".join(parts), base64.b64encode(token.encode()).decode(), "/w==", "YQ"]:
            bad.append({"Authorization": f"Basic {text}"})
        with mock.patch("hashlib.pbkdf2_hmac", side_effect=AssertionError):
            for headers in bad:
                with self.subTest(headers):
                    answer = self.client.get("/auth/check", headers=headers, status=401)
                    self.assertIn(answer.json["error"], ["Invalid token", "Invalid JWT header"])
            self.client.get("/auth/check", headers=self.basic("alice", token))
        self.client.get("/rest-auth", headers=self.basic("alice", token), status=401)
        challenges = self.client.get("/auth/check", status=401).headers.getall("WWW-Authenticate")
        self.assertEqual(challenges[2:], ['Basic realm="Login Required", charset="UTF-8"'])  # git waits for one
        browser = self.client.get("/auth/check", headers={"Sec-Fetch-Mode": "cors"}, status=401)
        self.assert_challenged(browser, "Authorization Required")

    def test_read_only_token_is_judged_by_the_method_of_the_request(self):
        fields = {"name": "reader", "read_only": "true"}
        token = self.call("POST /auth/tokens", fields, self.tokens, form=True, status=201).json
        self.call("GET /rest-auth", token=token)
        self.call("HEAD /rest-auth", token=token)
        answer = self.call("POST /auth/logout", token=token, status=403)
        self.assert_refused(answer, 403, "Forbidden", "This API token is good for GET and HEAD only")
        original, forwarded = "X-Original-Method", "X-Forwarded-Method"
        for headers, status in [
            ({original: "GET"}, 200),
            ({forwarded: "HEAD"}, 200),
            ({original: "POST"}, 403),
            ({forwarded: "DELETE"}, 403),
            ({original: "POST", forwarded: "GET"}, 403),  # the client can forge the one that its proxy does not set
            ({original: "GET", forwarded: "POST"}, 403),
            ({original: "get"}, 403),
            ({original: "GET", "Sec-WebSocket-Key": "x"}, 403),
            ({original: "GET, POST"}, 403),
            ({}, 403),  # the method is not known
        ]:
            with self.subTest(headers):
                headers |= bearer(token["access_token"])
                self.client.get("/auth/check", headers=headers, status=status)

    def test_missing_or_mistyped_field_is_400_that_names_it(self):
        good = {
            "POST /auth/refresh": {"refresh_token": "x"},
            "POST /auth/logout": {"scope": "local"},
            "PUT /auth/password": {"current_password": "correct horse", "new_password": "battery staple"},
            "POST /auth/tokens": {"name": "x", "expires_in": 60},
        }
        for route, name, values, words in [
            ("POST /auth/refresh", "refresh_token", [None, 5, ["x"]], "must be a string"),
            ("POST /auth/logout", "scope", [None, 5, ["local"], {}], "must be a string"),
            ("POST /auth/logout", "scope", ["", "all", "LOCAL"], "must be local, others or global"),
            ("PUT /auth/password", "current_password", [5, None], "must be a string"),
            ("PUT /auth/password", "new_password", [5, []], "must be a string"),
            ("POST /auth/tokens", "name", [None, 5, []], "must be a string"),
            ("POST /auth/tokens", "name", ["", "x" * 256, "a\nb", "\ud800"], "must have 1 to 255 characters"),
            ("POST /auth/tokens", "expires_in", [1.5, "60", None, True, [], float("inf")], "must be a whole number"),
            ("POST /auth/tokens", "expires_in", [0, -1, 366 * 86400 + 1, 2**70], "must be a whole number of seconds"),
            ("POST /auth/tokens", "roles", ["admin", None, 5, {}], "must be a list of strings"),
            ("POST /auth/tokens", "read_only", [None, 0, 1, "true", []], "must be true or false"),
        ]:
            for value in values:
                with self.subTest(route, name=name, value=value):
                    answer = self.call(route, good[route] | {name: value}, self.tokens, status=400)
                    self.assert_refused(answer, 400, "Bad Request")
                    self.assertRegex(answer.json["description"], f"^{name} {words}")
        for route in ["POST /auth/refresh", "PUT /auth/password", "POST /auth/tokens"]:
            answer = self.call(route, {}, self.tokens, status=400)
            self.assert_refused(answer, 400, "Bad Request", f"{[*good[route]][0]} is missing")
        for value in ["-5", "1e3", "6.0", "x", "", "9" * 30]:
            self.call("POST /auth/tokens", {"name": "x", "expires_in": value}, self.tokens, form=True, status=400)
        for fields in [
            {"read_only": "yes"},
            {"read_only": ""},
            {"roles": "Admin"},
            {"roles": "a,b"},
            {"readonly": "true"},
        ]:
            self.call("POST /auth/tokens", {"name": "x", **fields}, self.tokens, form=True, status=400)
        headers = bearer(self.tokens["access_token"])
        for path, kind, body in [
            ("/auth/tokens", JSON, b'{"name": "x", "read_only": true, "read_only": false}'),
            ("/auth/tokens", URLENCODED, b"name=x&read_only=true&read_only=false"),
            ("/auth/tokens?read_only=true", URLENCODED, b"name=x"),
            ("/auth/tokens", f"{JSON}; x=form", b'{"name": "x", "roles": "admin"}'),
        ]:
            answer = self.client.post(path, body, headers | {"Content-Type": kind}, status=400)
            self.assert_refused(answer, 400, "Bad Request")
        self.assertEqual(len(self.call("GET /auth/sessions", token=self.tokens).json), 1)


def bad_tokens(now):
    """BAD_TOKENS: yield (token, pattern of the description). Each has one fault, else it would be good at `now`."""

    def encode(part):
        return base64url(part if isinstance(part, bytes) else json.dumps(part).encode())

    def sign(header, claims):
        text = f"{encode(header)}.{encode(claims)}"
        return f"{text}.{encode(hmac.digest(SECRET.encode(), text.encode(), 'sha256'))}"

    hs256, claims = {"typ": "JWT", "alg": "HS256"}, {"exp": now + 300, "iat": now, "nbf": now, "identity": 1}
    for algorithm in ["none", "None", "NONE", "nOnE", "HS512", "RS256", "", None, 5, []]:
        yield f"{encode(hs256 | {'alg': algorithm})}.{encode(claims)}.", "alg"
        yield sign(hs256 | {"alg": algorithm}, claims), "alg"
    yield f"{encode(hs256)}.{encode(claims)}.", "^Signature verification failed$"
    yield jwt.encode(claims, SECRET, "HS512"), "alg value"
    for words, headers in {
        "crit": [hs256 | {"crit": ["exp"]}, hs256 | {"crit": ["<b>zzz"]}],
        "Key ID": [hs256 | {"kid": ["x"]}, hs256 | {"kid": 5}],
        "^Signature verification failed$": [hs256 | {"kid": kid} for kid in ("x", "../../dev/null", "' OR 1=1 --", "")],
        "[Aa]lg": [{"typ": "JWT"}, {"alg": 10**4000}],
        "Invalid header": [b'{"alg":' + b"9" * 5000 + b"}", b"[" * 3000, [], "x", None, 5],
    }.items():
        for header in headers:
            yield sign(header, claims), words
    for payload in [[], "x", None, 5, b"x", b"", b"[" * 3000]:
        yield sign(hs256, payload), "Invalid payload"
    for name in claims:
        yield sign(hs256, {key: value for key, value in claims.items() if key != name}), f'missing the "{name}" claim'
        yield sign(hs256, claims | {name: None}), f'missing the "{name}" claim'
    for name in ("exp", "iat", "nbf"):
        for value in [str(now), "", [now], {}, True, -1, 2**53, float("inf"), float("nan")]:
            yield sign(hs256, claims | {name: value}), name
    for value in ["1", 1.0, True, False, [1], {"id": 1}, 0, -1, 2**63, 2**70, "alice"]:
        yield sign(hs256, claims | {"identity": value}), "^The claim identity must be the integer id"
    for value in ["", "A" * 21, "A" * 23, "A" * 21 + ".", "Ä" * 22, 5, ["A" * 22], {}, True, None, "A" * 22 + "\n"]:
        yield sign(hs256, claims | {"sid": value}), "^The claim sid must"
    for changes, words in [
        *(({"sub": sub}, "name different users") for sub in ("2", "01", "")),
        ({"sub": 1}, "[Ss]ub"),
        ({"aud": "another service"}, "[Aa]udience"),
        ({"exp": now - 300}, "^Signature has expired$"),
        ({"iat": now + 300}, r"not yet valid \(iat\)"),
        ({"nbf": now + 300}, r"not yet valid \(nbf\)"),
        ({"exp": now + 301}, "must not live longer"),
    ]:
        yield sign(hs256, claims | changes), words
    for token in ["x", "x" * 100_000, "\xff", "\0", ".", "..", "a.b.c", sign(hs256, claims)[:-9]]:
        yield token, "."


CREDENTIALS = b'{"username": "alice", "password": "correct horse"}'
BAD_BODIES = [  # (Content-Type, body, status)
    *((JSON, body, 400) for body in [b"{", b"x", b'"alice"', b"5", b"null", b"true", b"[]", b'["username"]', b" "]),
    *((JSON, body, 400) for body in [b"[" * 50_000, b'{"a":' * 9999, b'{"a": ' + b"9" * 5000 + b"}"]),
    (JSON, CREDENTIALS.decode().encode("utf-16"), 400),
    (f"{JSON}; charset=latin-1", CREDENTIALS.replace(b"o", b"\xf6"), 400),
    (JSON, CREDENTIALS + b" " * 65536, 413),
    (JSON, b"x" * 100_000, 413),
    *((kind, CREDENTIALS, 400) for kind in ["", "text/plain", "text/html", "application/xml", "\xff", ";", "a" * 5000]),
    ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="username"', 400),
    *((URLENCODED, body, 400) for body in [b"username=%FF&password=x", b"a=1&" * 50, b"\xff", CREDENTIALS]),
]


@on_each_engine
class BadInputTest:
    """Each answer is a 4xx in the form of our errors. Nothing is written, and the service goes on."""

    users = ("alice",)

    def setUp(self):
        super().setUp()
        self.tokens = self.log_in()
        self.before = self.stored()

    def stored(self):
        return [self.raw_sql(f"SELECT * FROM {table} ORDER BY id") for table in ("user", "auth_session")]

    def tearDown(self):
        self.assertEqual(self.stored(), self.before)
        self.call("GET /rest-auth", token=self.tokens)
        self.log_in()

    def test_bad_token_is_401(self):
        for token, words in bad_tokens(int(time.time())):
            with self.subTest(token[:80]):
                answer = self.get("/rest-auth", token, status=401)
                self.assert_refused(answer, 401, "Invalid token")
                self.assertRegex(answer.json["description"], words)
                self.assertNotIn("zzz", answer.text)

    def test_bad_username_or_password_is_401_like_a_wrong_one(self):
        forms = [b"", b"username", b"username=alice", b"password=x", b"username=alice&password=", b"&&==", b"%"]
        fields = [{}, {"username": "alice"}, {"password": "correct horse"}]
        fields += [{"username": username, "password": "wrong"} for username in ("alice", "nobody")]
        for value in BAD_NAMES:
            fields += [{"username": value, "password": "correct horse"}, {"username": "alice", "password": value}]
        bodies = [(URLENCODED, form) for form in forms] + [(JSON, json.dumps(each).encode()) for each in fields]
        for kind, body in bodies:
            with self.subTest(body[:60]):
                self.store.delete_buckets("")  # else the throttle would answer
                answer = self.client.post("/auth", body, {"Content-Type": kind}, status=401)
                self.assert_refused(answer, 401, "Bad Request", "Invalid credentials")
                self.assert_challenged(answer, "Bad Request")

    def test_bad_body_is_400_or_413_on_every_route_that_takes_one(self):
        routes = ["POST /auth", "POST /auth/refresh", "POST /auth/logout", "POST /auth/tokens", "PUT /auth/password"]
        for route, (kind, body, status) in itertools.product(routes, BAD_BODIES):
            with self.subTest(route, kind=kind[:40], body=body[:60]):
                method, path = route.split()
                headers = bearer(self.tokens["access_token"]) | {"Content-Type": kind}
                answer = self.client.request(path, method=method, headers=headers, body=body, status=status)
                self.assert_refused(answer, status, {400: "Bad Request", 413: "Content Too Large"}[status])
                if "multipart" in kind:
                    self.assertIn(f"Send {JSON} or {URLENCODED}", answer.text)


class EmbeddedAppTest(Case):
    users = ("alice",)

    def post(self, path, body=b"", status=None, headers=None, **environ):
        return self.client.post(path, body, headers or {"Content-Type": JSON}, environ, status=status)

    def test_chunked_body_that_the_server_has_decoded_is_read_as_it_is(self):
        decoded = {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input_terminated": True}
        self.assertIn("access_token", self.post("/auth", CREDENTIALS, **decoded).json)
        self.assert_refused(self.post("/auth", b"x" * 70_000, 413, **decoded), 413, "Content Too Large")
        raw = b"%x\r\n%s\r\n0\r\n\r\n" % (len(CREDENTIALS), CREDENTIALS)
        self.assertIn("access_token", self.post("/auth", raw, HTTP_TRANSFER_ENCODING="chunked").json)
        for broken in [b"zz\r\n", raw[:20], CREDENTIALS]:
            with self.subTest(broken):
                answer = self.post("/auth", broken, 400, HTTP_TRANSFER_ENCODING="chunked")
                self.assert_refused(answer, 400, "Bad Request")

    def test_empty_or_longest_body_is_taken_and_a_longer_one_is_not_read(self):
        for kind in [JSON, URLENCODED, "text/plain", "multipart/form-data", ""]:
            headers = bearer(self.login()) | {"Content-Type": kind}
            with self.subTest(kind):
                self.assertEqual(self.post("/auth/logout", headers=headers).status_int, 204)
        body = CREDENTIALS + b" " * (server.MAX_BODY - len(CREDENTIALS))
        self.assertIn("access_token", self.post("/auth", body).json)
        unread = {"wsgi.input": mock.MagicMock(), "CONTENT_LENGTH": str(server.MAX_BODY + 1), "REQUEST_METHOD": "POST"}
        answer = self.client.do_request(webtest.TestRequest.blank("/auth", unread), status=413)
        self.assert_refused(answer, 413, "Content Too Large")
        unread["wsgi.input"].read.assert_not_called()

    def client_of_app(self, trusted_proxy, **changes):
        app = make_app(dataclasses.replace(self.settings, trusted_proxy=trusted_proxy, **changes))
        self.addCleanup(app.close)
        return webtest.TestApp(app)

    def log_in_from(self, client, remote, forwarded, password="correct horse", status=None):
        headers = {"X-Forwarded-For": forwarded} if forwarded else {}
        options = {"headers": headers, "extra_environ": {"REMOTE_ADDR": remote}, "status": status}
        return client.post_json("/auth", {"username": "alice", "password": password}, **options)

    def test_last_address_counts_only_if_the_trusted_proxy_sent_it(self):
        proxy = "127.0.0.1"
        for trusted, remote, forwarded, ip_address in [
            (proxy, proxy, "203.0.113.9, 192.0.2.7", "192.0.2.7"),  # the first is the client's own claim
            (proxy, proxy, "203.0.113.9,192.0.2.7:8080", "192.0.2.7"),
            (proxy, proxy, "[2001:db8::1]:443", "2001:db8::1"),
            (proxy, proxy, "[2001:db8::1]", "2001:db8::1"),
            (proxy, proxy, "::ffff:192.0.2.7", "192.0.2.7"),
            (proxy, proxy, None, proxy),
            (proxy, proxy, "x" * 100, "x" * 45),
            (proxy, f"::ffff:{proxy}", "192.0.2.7", "192.0.2.7"),
            (proxy, "198.51.100.1", "192.0.2.7", "198.51.100.1"),
            ("::1", "::1", "192.0.2.7", "192.0.2.7"),
            ("0:0:0:0:0:0:0:1", "::1", "2001:DB8:0::7", "2001:db8::7"),
            ("localhost", "", "192.0.2.7", "192.0.2.7"),  # a unix socket
            ("", proxy, "192.0.2.7", proxy),
            ("", "", "192.0.2.7", "localhost"),
        ]:
            with self.subTest(trusted, remote=remote, forwarded=forwarded):
                client = self.client_of_app(trusted)
                token = self.log_in_from(client, remote, forwarded).json["access_token"]
                session = client.get("/auth/me", headers=bearer(token)).json["session"]
                self.assertEqual(session["ip_address"], ip_address)

    def test_clients_behind_the_proxy_are_throttled_apart(self):
        client = self.client_of_app("127.0.0.1", login_limit=1)
        self.log_in_from(client, "127.0.0.1", "192.0.2.1", "wrong", 401)
        answer = self.log_in_from(client, "127.0.0.1", "192.0.2.1", status=429)
        wait = answer.headers["Retry-After"]
        self.assert_refused(answer, 429, "Too Many Requests", f"Too many failed logins; try again in {wait} s")
        self.assertTrue(0 < int(wait) <= 300)
        self.log_in_from(client, "127.0.0.1", "192.0.2.2")
        self.assertEqual(self.events("x_forwarded_for_untrusted"), [])
        client = self.client_of_app("")
        for _ in range(3):
            self.log_in_from(client, "127.0.0.1", "192.0.2.3")
        [event] = self.events("x_forwarded_for_untrusted")  # once a day
        self.assertEqual(event["ip_address"], "127.0.0.1")

    def test_unknown_path_or_method_is_json(self):
        for route, status, allow in [
            ("GET /nowhere", 404, None),
            ("OPTIONS /nowhere", 404, None),
            ("DELETE /auth", 405, "POST"),
            ("PATCH /rest-auth", 405, "GET"),
            ("OPTIONS /rest-auth", 405, "GET"),
            ("HEAD /rest-auth", 401, None),
        ]:
            with self.subTest(route):
                answer = self.call(route, status=status)
                if status in (404, 405):
                    self.assert_refused(answer, status, {404: "Not Found", 405: "Method Not Allowed"}[status])
                self.assertNotRegex(answer.text, "nowhere|PATCH|DELETE")
                self.assertEqual(answer.headers.get("Allow"), allow)
        self.assertEqual(self.client.head("/health").headers["Content-Length"], "17")

    def test_abort_of_an_own_handler_keeps_its_words_and_a_failure_tells_nothing(self):
        for status in [400, 404, 405, 409, 418, 499, 599]:
            self.app.route(f"/{status}", callback=functools.partial(bottle.abort, status, "our words"), public=True)
            answer = self.client.get(f"/{status}", status=status)
            self.assertEqual((answer.json["status_code"], answer.json["description"]), (status, "our words"))
        self.app.route("/broken", callback=lambda: 1 / 0, public=True)
        answer = self.client.get("/broken", status=500, expect_errors=True)
        self.assert_refused(answer, 500, "Internal Server Error")
        self.assertNotIn("division", answer.text)


# --- Structure ---


def run_python(folder, *arguments, typed="", **environment):
    environment = clean_environment() | {"AUTH_PBKDF2_ITERATIONS": "1"} | environment
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, input=typed, capture_output=True, text=True)


class StructureTest(Case):
    SOURCE = (HERE / "server.py").read_text("utf-8")
    PUBLIC = {"POST /auth", "POST /auth/refresh", "GET /.well-known/jwks.json", "GET /health"}

    def test_rooms_stand_in_the_order_of_the_design_and_have_at_most_2700_lines(self):
        rooms = "Settings, Errors and log, Passwords, Store, Keys and tokens, Auth service, Plugin, HTTP API, Server"
        found = re.findall("^# --- (.+) ---$", self.SOURCE, re.MULTILINE)
        self.assertEqual(found, [*rooms.split(", "), "Command line"])
        self.assertLessEqual(len(self.SOURCE.splitlines()), 2700)

    def test_every_route_that_is_not_public_answers_401_with_a_challenge_when_called_bare(self):
        routes = {f"{route.method} {route.rule}": server.is_public(route) for route in self.app.routes}
        self.assertEqual({route for route, public in routes.items() if public}, self.PUBLIC)
        for route in routes.keys() - self.PUBLIC:
            method, rule = route.split()
            with self.subTest(route):
                answer = self.client.request(rule, method=method, status=401, headers={"Sec-Fetch-Mode": "cors"})
                self.assert_refused(answer, 401, "Authorization Required")
                self.assert_challenged(answer, "Authorization Required")

    def test_every_route_command_setting_and_limit_is_in_the_readme(self):
        expected = [f"`{route.method} {route.rule.replace('<sid>', 'ID')}`" for route in self.app.routes]
        self.assertEqual([text for text in expected if text not in README], [])
        commands = [command for command, *_ in server.COMMANDS]
        self.assertEqual([name for name in commands if not re.search(rf"`server.py {name}[ `]", README)], [])
        table = re.findall(r"(?m)^\| `AUTH_(\w+)` \| (?:`(.*?)`)? ?\| (.*) \|$", README)
        fields = dataclasses.fields(Settings)
        self.assertEqual(table, [(one.name.upper(), str(one.default), one.metadata["help"]) for one in fields])
        options = server.WAITRESS_OPTIONS | {"connection_limit": server.connection_limit()}
        self.assertIn(f"| {Settings.login_limit}, then one more every 300 s |", README)
        self.assertIn(f"{server.MAX_BODY // 1024} KiB; {options['max_request_header_size'] // 1024} KiB |", README)
        self.assertIn(f"{options['channel_timeout']} s; {server.DRAIN_TIMEOUT} s |", README)

    def test_packages_and_files_are_those_of_the_design(self):
        script = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", self.SOURCE)[1]
        listed = ast.literal_eval(re.search(r"(?s)dependencies = (\[.*\])", script.replace("#", ""))[1])
        required = (HERE / "requirements.txt").read_text("utf-8").splitlines()
        self.assertEqual([*listed, "WebTest"], [re.sub("^WebTest.*", "WebTest", line) for line in required])
        tracked = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True)
        if tracked.returncode:
            self.skipTest("not a git checkout")
        visible = {path.partition("/")[0] for path in tracked.stdout.split() if not path.startswith(".")}
        self.assertEqual(visible, {"server.py", "schema.sql", "test_server.py", "requirements.txt", "README.md"})

    def test_python_without_docstrings_or_packages_or_too_old_prints_no_traceback(self):
        ast.parse(self.SOURCE, feature_version=(3, 9))  # else it is a SyntaxError
        old = "import sys, runpy; sys.version_info = (3, 9, 0); runpy.run_path(sys.argv[1], run_name='__main__')"
        for options, status, words in [
            (["-OO", HERE / "server.py", "--help"], 0, "^$"),
            (["-OO", HERE / "server.py", "key", "rotate"], 0, "^$"),
            (["-S", HERE / "server.py"], 1, r"^server.py: \w+ is not installed; run: .* -m pip install -r req"),
            (["-c", old, HERE / "server.py"], 1, r"^server.py: Python 3.10 or newer is needed; this is 3"),
        ]:
            with self.subTest(options):
                done = run_python(self.folder, *options)
                self.assertEqual((done.returncode, done.stderr.count("\n")), (status, status), done.stderr)
                self.assertRegex(done.stderr, words)


# --- Server ---


class ServerTest(Case):
    """`python server.py` as a process, through real sockets."""

    def add_alice(self, database):
        """Add the user and return the environment of a service."""
        with contextlib.closing(server.Store.open(Settings(database=database))) as store:
            store.create_tables()
            store.add_user("alice", server.hash_password("correct horse", 1))
        return {"AUTH_DATABASE": database, "AUTH_KEY_FILE": f"{self.folder}/auth.keys"}

    def test_demo_serves_roy_until_a_signal_and_leaves_nothing_on_disk(self):
        for host, number in [("127.0.0.1", signal.SIGINT), ("::1", signal.SIGTERM)]:
            with self.subTest(host):
                if ":" in host and not os.path.exists("/proc/net/if_inet6"):
                    self.skipTest("no IPv6 here")
                with Service(self.folder, "--demo", "--host", host) as service:
                    status, _, text = service.request("GET", "/auth/me", **bearer(service.login("roy", "roy")))
                    self.assertEqual((status, json.loads(text)["username"]), (200, "roy"))
                    self.assertEqual(service.stop(number), 0)
                    self.assertEqual([path.name for path in self.folder.iterdir()], ["errors"])
                self.assertEqual([json.loads(line)["event"] for line in service.log.splitlines()], ["login"])

    def test_logout_at_one_process_ends_the_session_at_the_other(self):
        for database in self.on_each_database():
            environment = self.add_alice(database)
            one, other = (Service(self.folder, **environment) for _ in range(2))
            with self.subTest(database), one, other:
                for method, path in [("POST", "/auth/logout"), ("DELETE", "/auth/sessions/{}")]:
                    caller = bearer(one.login("alice", "correct horse"))
                    self.assertEqual(one.request("GET", "/rest-auth", **caller)[0], 200)
                    sid = json.loads(other.request("GET", "/auth/me", **caller)[2])["session"]["id"]
                    self.assertEqual(other.request(method, path.format(sid), **caller)[0], 204)
                    status, _, text = one.request("GET", "/rest-auth", **caller)
                    self.assertEqual((status, json.loads(text)["description"]), (401, "Session has ended"))

    def test_secrets_are_neither_in_ps_nor_in_the_log(self):
        database = self.database
        if mariadb:
            name = self.new_database()
            mariadb.run(f"GRANT ALL ON {name}.* TO roy@localhost IDENTIFIED BY 'hunter2'")
            database = mariadb.url(name, "roy", "hunter2")
        with Service(self.folder, AUTH_SECRET_KEY=SECRET, **self.add_alice(database)) as service:
            token = service.login("alice", "correct horse")
            self.assertEqual(service.login("alice", "wrong horse"), 401)
            status, _, text = service.request("POST", "/auth/tokens", "name=backup", **FORM, **bearer(token))
            self.assertEqual(status, 201, text)
            sent = [token, json.loads(text)["access_token"], "secret-of-another"]
            for credential in sent:
                self.assertEqual(service.request("GET", "/auth/me", **bearer(f"{credential}x"))[0], 401)
            listed = subprocess.run(["ps", "-ww", "-o", "args", "-p", str(service.process.pid)], capture_output=True)
        shown = listed.stdout.decode() + service.banner + service.log
        self.assertRegex(shown, "(?s)server.py.*api_token_created")
        for secret in [*sent, token.rpartition(".")[2], SECRET, "hunter2", "correct horse", "wrong horse", "pbkdf2:"]:
            self.assertNotIn(secret, shown)

    def test_unix_socket_replaces_a_stale_one(self):
        path = f"{self.folder}/socket"
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(path)
        service = Service(self.folder, "--demo", "--host", path)
        self.addCleanup(service.__exit__)
        self.assertIn(f" on unix:{path}, ", service.process.stdout.readline())
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o660)
        second = run_python(self.folder, HERE / "server.py", "--demo", "--host", path)
        self.assertRegex(second.stderr, f"^server.py: {path}.* in use.*--host or --port\n$")
        curl = ["curl", "-s", "--unix-socket", path, "-d", "username=roy&password=roy", "http://localhost/auth"]
        self.assertIn(b"access_token", subprocess.check_output(curl))

    def test_kill_9_loses_no_acknowledged_login_or_logout(self):
        environment = self.add_alice(self.database)
        active, ended = [], []

        def log_in_and_out(service):
            with contextlib.suppress(OSError, http.client.HTTPException):
                while True:
                    active.append(bearer(service.login("alice", "correct horse")))
                    other = bearer(service.login("alice", "correct horse"))
                    if service.request("POST", "/auth/logout", **other)[0] == 204:
                        ended.append(other)

        with Service(self.folder, **environment) as service, concurrent.futures.ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(log_in_and_out, service) for _ in range(4)]
            wait_for(lambda: len(ended) > 20)
            self.assertEqual(service.stop(signal.SIGKILL), -signal.SIGKILL)
            self.assertEqual([client.result() for client in clients], [None] * 4)
        with Service(self.folder, **environment) as service:
            self.assertEqual({service.request("GET", "/rest-auth", **caller)[0] for caller in active}, {200})
            self.assertEqual({service.request("GET", "/rest-auth", **caller)[0] for caller in ended}, {401})

    def ask_until_told_to_close(self, service, caller):
        """Use one connection again and again, until the service says `Connection: close`. Return the statuses."""
        connection, statuses = http.client.HTTPConnection(*service.address, timeout=30), set()
        with contextlib.closing(connection):
            while True:
                connection.request("GET", "/rest-auth", headers=caller)
                answer = connection.getresponse()
                statuses.add(answer.status)
                answer.read()
                if answer.getheader("Connection") == "close":
                    return statuses

    def test_drain_answers_all_while_another_process_takes_the_socket_of_systemd_over(self):
        environment = self.add_alice(self.database) | {"AUTH_PBKDF2_ITERATIONS": "50000"}
        with (
            concurrent.futures.ThreadPoolExecutor(48) as pool,
            contextlib.ExitStack() as stack,
            socket.create_server(("127.0.0.1", 0), backlog=1024) as listener,
        ):
            folders = [tempfile.mkdtemp(dir=self.folder) for _ in range(2)]
            services = [Service(folder, listener=listener, **environment) for folder in folders]
            first, second = map(stack.enter_context, services)
            self.assertEqual([first.address, second.address], [listener.getsockname()] * 2)
            caller = bearer(first.login("alice", "correct horse"))
            logins = [pool.submit(first.login, "alice", "correct horse") for _ in range(32)]
            kept = [pool.submit(self.ask_until_told_to_close, first, caller) for _ in range(16)]
            wait_for(lambda: any(login.done() for login in logins))
            self.assertEqual(first.stop(signal.SIGTERM), 0)
            self.assertEqual({type(login.result()) for login in logins}, {str})
            listener.close()  # now the second is alone, so what it leaves in the queue of the kernel is lost
            queued = [stack.enter_context(socket.create_connection(second.address)) for _ in range(200)]
            for connection in queued:
                connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            self.assertEqual(second.stop(signal.SIGTERM), 0)
            self.assertEqual({connection.recv(12) for connection in queued}, {b"HTTP/1.0 200"})
            self.assertEqual([client.result() for client in kept], [{200}] * 16)
        for service in (first, second):  # such as none for a request that waits for a thread
            self.assertLessEqual({json.loads(line)["event"] for line in service.log.splitlines()}, {"login"})

    def test_tokens_are_checked_while_logins_hash_on_all_cores(self):
        environment = {"AUTH_SECRET_KEY": SECRET, "AUTH_THREADS": "1", "AUTH_PBKDF2_ITERATIONS": "9999999"}
        environment |= self.add_alice(self.database)
        number, caller = server.HashLimiter.CORES + 1, bearer(self.token())
        with concurrent.futures.ThreadPoolExecutor(number) as pool, Service(self.folder, **environment) as service:
            threads = f"/proc/{service.process.pid}/task"
            before = len(os.listdir(threads))
            logins = [pool.submit(service.login, "alice", "correct horse") for _ in range(number)]
            wait_for(lambda: len(os.listdir(threads)) == before + number)
            for _ in range(5):
                self.assertEqual(service.request("GET", "/rest-auth", **caller)[0], 200)
            self.assertFalse(any(login.done() for login in logins))
            service.stop(signal.SIGKILL)  # these logins take several seconds

    def test_second_signal_ends_a_drain_at_once(self):
        with Service(self.folder, "--demo") as service, socket.create_connection(service.address) as unfinished:
            unfinished.sendall(b"GET /health HTTP/1.1\r\n")
            self.assertEqual(service.request("GET", "/health")[0], 200)

            def is_ended():
                service.process.send_signal(signal.SIGTERM)
                return service.process.poll() is not None

            wait_for(is_ended, server.DRAIN_TIMEOUT / 2)
            self.assertEqual(service.process.poll(), -signal.SIGTERM)


class HTTPParserTest(Case):
    BODY = b"username=roy&password=roy"
    CHUNKS = b"19\r\n" + BODY + b"\r\n0\r\n\r\n"

    def post(self, *headers, body=BODY, version="1.1", host="Host: a"):
        """A login, with a request behind it that must not be answered."""
        lines = [f"POST /auth HTTP/{version}", f"Content-Type: {URLENCODED}", *headers, host, "", ""]
        return "\r\n".join(lines).encode("latin-1") + body + b"GET /rest-auth HTTP/1.1\r\nHost: a\r\n\r\n"

    def ambiguous_requests(self):
        """Requests whose end two servers could see at different places (RFC 9112, 6.1 to 6.3), or without one host."""
        size, chunked = "Content-Length: 25", "Transfer-Encoding: chunked"
        for length in ["25", "26", "0"]:
            yield self.post(size, f"Content-Length: {length}")
        for length in ["5, 5", "-1", "+5", "0x5", "1e1", "5 5", "5_0", "\xb2", "9" * 5000]:
            yield self.post(f"Content-Length: {length}")
        for encoding in ["chunked", "identity", "", ",", "chunked, chunked", "chunked,", "xchunked", "\x0bchunked"]:
            yield self.post(size, f"Transfer-Encoding: {encoding}", body=self.CHUNKS)
            yield self.post(f"Transfer-Encoding: {encoding}", size, body=self.CHUNKS)
        for encoding in ["chunked, identity", "identity, chunked", "gzip", "gzip, chunked", "chunked\x0b", "\0chunked"]:
            yield self.post(f"Transfer-Encoding: {encoding}", body=self.CHUNKS)
        for header in ["Transfer_Encoding: chunked", "Transfer-Encoding : chunked", "Transfer-Encoding:\r\n chunked"]:
            yield self.post(size, header, body=self.CHUNKS)
        yield self.post(size, "X: a\nTransfer-Encoding: chunked", body=self.CHUNKS)
        yield self.post("Content-Length : 5")
        yield self.post(chunked, chunked, body=self.CHUNKS)
        yield self.post(chunked, body=self.CHUNKS, version="1.0")
        yield self.post(chunked, body=b"zz\r\n" + self.CHUNKS)
        yield self.post(chunked, body=self.CHUNKS.replace(b"19", b"-19"))
        for host in ["X: y", "Host: a\r\nHost: b", "Host: a, b"]:
            yield self.post(size, host=host)

    def test_request_smuggling_and_malformed_requests_are_refused_and_chunks_decoded(self):
        with Service(self.folder, "--demo", "--login-limit", "0") as service:
            requests = [(data, (400, 501)) for data in self.ambiguous_requests()]
            for start, status in [
                ("GET /health HTTP/1.1\r\nsecret-of-client : y", 400),
                ("GET http://[::1/secret-of-client HTTP/1.1", 400),
                ("GET /health HTTP/1.1\r\nX: " + "secret-of-client" * 1024, 431),
                ("POST /secret-of-client HTTP/1.1\r\nContent-Length: 9999999", 413),
                ("POST /auth HTTP/1.1\r\nTransfer-Encoding: secret-of-client", 501),
            ]:
                requests.append((f"{start}\r\nHost: a\r\n\r\n".encode(), [status]))
            for data, statuses in requests:
                with self.subTest(data[:150]):
                    answer = service.raw(data)  # one answer, and then the end of the connection
                    [status] = re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer)
                    self.assertIn(int(status), statuses)
                    words = rb"(?i)traceback|waitress|bottle|python|server:|access_token|secret-of-client"
                    self.assertNotRegex(answer, words)
            answer = service.raw(b"GET /auth/check HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n\r\n")
            self.assertEqual(re.findall(rb"HTTP/1.1 (\d{3}) ", answer), [b"401"])  # without a wait for a body
            large = b"x" * 1_000_000
            for body, status in [(iter([self.BODY[:9], self.BODY[9:]]), 200), (large[: 2**16 + 1], 413), (large, 413)]:
                answer = service.request("POST", "/auth", body, **FORM)
                self.assertEqual((answer[0], answer[1]["Server"]), (status, None))
        self.assertNotIn("Traceback", service.log)


class OtherServersTest(Case):
    """`server:app` under other WSGI servers. Those that are not installed are skipped."""

    WSGIREF = "import server, wsgiref.simple_server as w; w.make_server('127.0.0.1', {}, server.app).serve_forever()"
    SERVERS = {
        "python3": ["-c", WSGIREF],
        "granian": "--interface wsgi --workers 2 --blocking-threads 4 --port {} server:app".split(),
        "gunicorn": "--workers 2 --worker-class gthread --threads 4 --bind 127.0.0.1:{} server:app".split(),
        "uwsgi": "--http-socket 127.0.0.1:{} --module server:app --master --threads 4 --die-on-term".split(),
    }
    request = Service.request

    def is_up(self):
        with contextlib.suppress(OSError):
            return self.request("GET", "/health")[0] == 200

    def test_app_serves_under_each_server(self):
        self.assertTrue(callable(vars(server)["app"]))  # uWSGI and mod_wsgi look the name up in the module's dict
        self.add_user()
        self.add_user('Ж"ö')
        body = b"username=alice&password=correct+horse"
        forwarded = {"X_Forwarded_For": "203.0.113.7, [2001:db8::7]:4711"}  # the proxy itself has seen the last one
        variables = {"DATABASE": self.database, "KEY_FILE": f"{self.folder}/auth.keys", "TRUSTED_PROXY": "127.0.0.1"}
        variables["PBKDF2_ITERATIONS"] = "1"
        environment = clean_environment() | {f"AUTH_{name}": text for name, text in variables.items()}
        options = {"cwd": self.folder, "env": environment | {"PYTHONPATH": str(HERE)}, "stdout": -3, "stderr": -3}
        ports = {}
        for name, arguments in self.SERVERS.items():  # all start at once
            path = Path(sys.executable).with_name(name)
            if path.exists():
                ports[name] = free_port()
                process = subprocess.Popen([path, *(word.format(ports[name]) for word in arguments)], **options)
                self.addCleanup(process.wait, 30)
                self.addCleanup(process.terminate)
        for name in self.SERVERS:
            with self.subTest(name):
                if name not in ports:
                    self.skipTest(f"no {name} here: pip install {name}")
                self.address = "127.0.0.1", ports[name]
                wait_for(self.is_up)
                sent = iter([body]) if name in ("granian", "gunicorn") else body  # the others do not decode chunks
                status, _, text = self.request("POST", "/auth", sent, **FORM, **forwarded)
                self.assertEqual(status, 200, text)
                caller = bearer(json.loads(text)["access_token"])
                session = json.loads(self.request("GET", "/auth/me", **caller)[2])["session"]
                self.assertEqual(session["ip_address"], "2001:db8::7")
                fields = urllib.parse.urlencode({"username": 'Ж"ö', "password": "correct horse"})
                other = json.loads(self.request("POST", "/auth", fields, **FORM)[2])["access_token"]
                sent = self.request("GET", "/auth/check", **bearer(other))[1]["Remote-User"]
                self.assertEqual(sent.encode("latin-1").decode(), 'Ж"ö')
                caller["Content_Type"] = JSON  # although there is no body
                self.assertEqual(self.request("POST", "/auth/logout", **caller)[0], 204)


# --- Command line ---


class CommandLineCase(Case):
    def setUp(self):
        super().setUp()
        self.key_file, self.shown = f"{self.folder}/auth.keys", server.parse_database(self.database)
        variables = {"AUTH_DATABASE": self.database, "AUTH_KEY_FILE": self.key_file, "AUTH_PBKDF2_ITERATIONS": "1"}
        patch = mock.patch.dict(os.environ, clean_environment() | variables, clear=True)
        patch.start()
        self.addCleanup(patch.stop)
        for logger in (server.log, logging.getLogger()):  # `serve` adds handlers
            self.addCleanup(setattr, logger, "handlers", [*logger.handlers])

    def run_main(self, *argv, typed="", run=lambda app, service, on_ready: on_ready("http://here"), **environment):
        """(exit status, standard output, standard error) of one command."""
        with (
            contextlib.redirect_stdout(io.StringIO()) as output,
            contextlib.redirect_stderr(io.StringIO()) as errors,
            mock.patch("sys.stdin", io.StringIO(typed)),
            mock.patch.dict(os.environ, environment),
        ):
            status = server.main(argv, run)
        return status, output.getvalue(), errors.getvalue()

    def assert_fails(self, argv, status, words, **options):
        result = self.run_main(*argv, **options)
        self.assertEqual(result[:2], (status, ""), result)
        self.assertRegex(result[2], rf"^server.py: .*{words}")
        self.assertEqual(result[2].count("\n"), 1, result[2])
        self.assertNotRegex(result[2], f"{SECRET}|hunter2")


class CommandTest(CommandLineCase):
    def test_user_commands_change_and_list_users(self):
        for command, printed in [
            ("user add alice", f"user alice added to {self.shown}\n"),
            ("user list", "1\talice\tpbkdf2:sha256:1\t0\n"),
            ("user passwd alice", "user passwd alice: done\n"),
            *[("user disable alice", "user disable alice: done\n")] * 2,  # again changes nothing
            ("user list", "1\talice\tdisabled\t0\n"),
            ("key rotate", None),
            ("user enable alice", "user enable alice: done\n"),
            ("user list", "1\talice\tpbkdf2:sha256:1\t1\n"),
            ("user logout alice", "user logout alice: done\n"),
            ("user roles alice", "user roles alice: no roles\n"),
            ("user roles alice +editor +admin -x", "user roles alice: admin editor\n"),
            ("user roles alice", "user roles alice: admin editor\n"),
            ("user list", "1\talice\tpbkdf2:sha256:1\t0\tadmin\teditor\n"),
            ("user roles alice -editor -admin", "user roles alice: no roles\n"),
            ("user list", "1\talice\tpbkdf2:sha256:1\t0\n"),
            ("user remove alice", "user remove alice: done\n"),
            ("user list", ""),
        ]:
            with self.subTest(command):
                status, output, errors = self.run_main(*command.split(), typed="correct horse\r\n")
                self.assertEqual((status, output, errors), (0, output if printed is None else printed, ""))
            if command == "user enable alice":
                self.service.login("alice", "correct horse", time.time())

    def test_key_commands_change_and_list_keys(self):
        at, kids = self.key_file, []
        for command, printed in [
            ("rotate --alg EdDSA", "{0} added; {0} signs, with EdDSA, from {at}\n"),
            ("rotate --alg HS256", "{1} added; {1} signs, with HS256, from {at}\n"),
            ("add", "{2} added; {1} signs, with HS256, from {at}\n"),
            ("list", "{1}\tHS256\tsigns\t{at}\n{2}\tHS256\tverifies\t{at}\n{0}\tEdDSA\tverifies\t{at}\n"),
            ("promote {2}", "{2} promoted; {2} signs, with HS256, from {at}\n"),
            ("remove {2}", "{2} removed; {1} signs, with HS256, from {at}\n"),
            ("remove {1}", "{1} removed; {0} signs, with EdDSA, from {at}\n"),
        ]:
            status, output, errors = self.run_main("key", *command.format(*kids).split())
            kids += [output.split()[0]] * (len(kids) < 3)
            self.assertEqual((status, output, errors), (0, printed.format(*kids, at=at), ""))
        kid, *line = self.run_main("key", "list", AUTH_SECRET_KEY=SECRET)[1].splitlines()[-1].split("\t")
        self.assertEqual(line, ["HS256", "verifies", "AUTH_SECRET_KEY"])
        self.assert_fails(["key", "remove", kid], 1, "unset the variable and restart", AUTH_SECRET_KEY=SECRET)
        self.assert_fails(["key", "remove", kids[0]], 1, "is the last key; run `key rotate` first")
        self.assert_fails(["key", "promote", kids[1]], 1, "there is no key.*key list")

    def test_key_remove_takes_a_kid_that_begins_with_a_hyphen(self):
        keys = (server.new_jwk("HS256") for _ in itertools.count())
        jwks = [next(keys), *(next(jwk for jwk in keys if jwk["kid"].startswith("-")) for _ in range(2))]
        Path(self.key_file).write_text(json.dumps({"keys": jwks}))
        os.chmod(self.key_file, 0o600)
        for jwk, options in [(jwks[1], []), (jwks[2], ["--key-file", self.key_file])]:
            with self.subTest(options):
                self.assertEqual(self.run_main("key", "remove", jwk["kid"], *options)[::2], (0, ""))

    def test_start_that_fails_prints_one_line(self):
        def run(app, service, on_ready):
            server.run(app, service, self.fail)

        live, file = f"{self.folder}/live", f"{self.folder}/file"
        Path(file).write_text("not a socket")
        with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket(socket.AF_UNIX) as unix:
            unix.bind(live)
            unix.listen()
            port = listener.getsockname()[1]
            for options, words in [
                (["--port", str(port)], f"127.0.0.1 port {port}: Address already in use; .*--port"),
                (["--host", live], f"{live}.* in use.*--host"),
                (["--host", file], f"{file}.*--host"),
                (["--host", "/no/folder/socket"], "/no/folder/socket.*--host"),
            ]:
                with self.subTest(options):
                    self.assert_fails(["--demo", *options], 1, words, run=run)
        self.assertEqual(Path(file).read_text(), "not a socket")
        for command, words in [
            (f"ulimit -n 90; {sys.executable} {HERE}/server.py --demo --port 0", "raise ulimit -n"),
            (f"{sys.executable} {HERE}/server.py user add bob <&-", "8 to 1024 characters"),
        ]:
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
            self.assertEqual((done.returncode, done.stdout), (1, ""))
            self.assertRegex(done.stderr, rf"^server.py: .*{words}.*\n$")

    def test_errors_are_one_line_that_says_what_to_do(self):
        self.run_main("user", "add", "alice", typed="correct horse\n")
        missing = f"sqlite:///{self.folder}/missing.db"
        for command, status, words in [
            ("key list", 1, "auth.keys: .*the service makes it"),
            ("user add bob", 1, "8 to 1024 characters"),
            ("user remove \udcff", 1, "no user.*user list"),
            ("user roles alice admin", 1, "'admin' is not .ROLE or -ROLE; .*nothing was changed"),
            ("user roles alice +Admin", 1, "'Admin' is not a role"),
            (
                "user roles alice +admin --database x",
                1,
                "'--database' is not .ROLE or -ROLE; other flags stand before NAME",
            ),
            ("user roles alice -h", 1, "'-h' is not .ROLE or -ROLE"),
            ("user roles alice +x -x", 1, ".x and -x contradict each other; nothing was changed"),
            ("user roles", 2, "NAME.*--help"),
            ("user", 2, "ACTION.*--help"),
            ("user add", 2, "NAME.*--help"),
            ("--demo=hunter2", 2, "--demo: ignored explicit argument; see"),
            ("paint", 2, "COMMAND.*serve.*--help"),
            ("--prot 80", 2, "--prot; see .*--help"),
            ("--secret-key=hunter2", 2, "--secret-key; see .*--help"),
            ("--secret-key hunter2", 2, "--secret-key; see .*--help"),
            ("user add bob hunter2", 2, "unrecognized arguments; see .*--help"),
            ("hunter2", 2, "invalid choice"),
            ("key rotate --alg none", 2, "--alg.*HS256"),
            ("--demo --database sqlite:///x.db", 1, "leave --database"),
            ("--demo --host 0.0.0.0", 1, "--demo serves loopback only"),
            ("--demo --host 127.evil.com", 1, "--demo serves loopback only"),
            ("--host=", 1, "host .AUTH_HOST, --host. is wrong; .*address"),
            ("--port many", 1, "port .AUTH_PORT, --port. is wrong; .*from 0 to 65535"),
            ("--database mysql://roy:hunter2@db/users", 1, "put it into AUTH_DATABASE"),
            ("--database sqlite:////no/folder/auth.db", 1, "unable to open"),
            ("init --database mysql://roy@127.0.0.1:1/users", 1, "refused.*AUTH_DATABASE"),
            ("--key-file /no/folder/auth.keys", 1, "No such file.*AUTH_KEY_FILE or --key-file"),
            (f"user passwd bob --database {missing}", 1, "does not exist; --database or AUTH_DATABASE"),
            (f"doctor --database {missing}", 1, "does not exist; --database or AUTH_DATABASE"),
        ]:
            with self.subTest(command):
                self.assert_fails(command.split(), status, words, typed="short\n")
        self.assert_fails(["user", "add", "alice"], 1, "'alice' exists already", typed="correct horse\n")
        self.assert_fails([], 1, "AUTH_PROT is not a setting; .*AUTH_PORT", AUTH_PROT="80")
        self.assert_fails(["doctor"], 1, "secret_key, .*secrets.token_urlsafe", AUTH_SECRET_KEY="secret-key")
        self.assertFalse((self.folder / "missing.db").exists())

    def test_new_files_belong_to_the_owner_of_the_folder_and_user_add_prints_the_path(self):
        if os.geteuid() == 0:
            shutil.chown(self.folder, "nobody")
        arguments = [HERE / "server.py", "user", "add", "alice", "--database", "sqlite:///my.db"]
        done = run_python(self.folder, *arguments, typed="correct horse\n")
        self.run_main("key", "rotate")
        for name in ("my.db", "auth.keys"):
            status = (self.folder / name).stat()
            self.assertEqual((status.st_uid, stat.S_IMODE(status.st_mode)), (self.folder.stat().st_uid, 0o600), name)
        self.assertIn(f"{self.folder}/my.db", done.stdout, done.stderr)

    def test_password_prompt_at_a_terminal_asks_twice(self):
        command = [sys.executable, HERE / "server.py", "user", "add", "alice"]
        for second, status, words in [
            (b"correct house\n", 1, "server.py: The two passwords differ; nothing was changed\n"),
            (None, 1, "server.py: interrupted\n"),  # Ctrl-C
            (b"correct horse\n", 0, ""),
        ]:
            keyboard, terminal = os.openpty()
            self.addCleanup(os.close, keyboard)
            with subprocess.Popen(command, stdin=terminal, stdout=-1, stderr=-1, start_new_session=True) as process:
                os.close(terminal)
                self.assertEqual(process.stderr.read(14), b"New password: ")
                os.write(keyboard, b"correct horse\n")
                self.assertEqual(process.stderr.read(8), b"\nAgain: ")
                if second:
                    os.write(keyboard, second)
                else:
                    process.send_signal(signal.SIGINT)
                self.assertEqual(process.stderr.read().decode().lstrip("\n"), words)
            self.assertEqual(process.returncode, status)
        self.assertEqual([user.username for user in self.store.iter_users()], ["alice"])

    def test_serve_prints_which_key_signs(self):
        banner = f"rest-auth {server.__version__} on http://here, users in {self.shown}, HS256 key in "
        secret = {"AUTH_SECRET_KEY": SECRET}
        self.assertEqual(self.run_main(**secret)[:2], (0, f"{banner}AUTH_SECRET_KEY\n"))
        self.assertFalse(os.path.exists(self.key_file))
        self.assertEqual(self.run_main("serve")[:2], (0, f"{banner}{self.key_file}\n"))
        self.assertEqual(self.run_main(**secret)[:2], (0, f"{banner}{self.key_file}\n"))
        self.assertRegex(self.run_main("--demo")[1], "^rest-auth .* users in memory, .* in memory\nLog in as roy")

    def test_help_version_and_init(self):
        for command, function, *_ in server.COMMANDS:
            printed = self.run_main(*command.split(), "--help")
            self.assertEqual((printed[0], printed[2]), (0, ""))
            self.assertIn(" ".join(function.__doc__.split()), " ".join(printed[1].split()))
        self.assertRegex(self.run_main("--help")[1], "(?s)^usage: server.py .* serve .* init .* doctor .* user .* key ")
        self.assertEqual(self.run_main("--version"), (0, f"rest-auth {server.__version__}\n", ""))
        self.assertEqual(self.run_main("init"), (0, f"tables are ready in {self.shown}\n", ""))

    def test_closed_pipe_ends_a_list_quietly(self):
        self.store.add_users([(f"{number}" * 60, "x", "") for number in range(300)])
        command = f"set -o pipefail; {sys.executable} {HERE / 'server.py'} user list | head -c 1"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (1, "1", ""))


class ExportTest(CommandLineCase):
    HASHES = [TUTORIAL_HASH, server.hash_password("roy", 1), "scrypt:16:1:1$salt$" + "0a" * 64]
    LINE = '{"username": "%s", "password_hash": "%s"}\n'

    def test_export_is_imported_elsewhere(self):
        names = ["alice", "Ærøskøbing", "日本語😀", 'a"b\\c', *(f"user{number}" for number in range(1000))]
        hashes = [self.HASHES[0], server.DISABLED_PREFIX + self.HASHES[1], self.HASHES[2]]
        self.store.add_users([*zip(names, itertools.cycle(hashes), itertools.cycle(["", "admin b"]))])
        status, lines, errors = self.run_main("user", "export")
        self.assertEqual((status, errors), (0, ""))
        exported = [json.loads(line) for line in lines.splitlines()]
        self.assertEqual(exported[0], {"username": "alice", "password_hash": self.HASHES[0]})
        self.assertEqual(exported[1], {"username": names[1], "password_hash": hashes[1], "roles": ["admin", "b"]})
        for database in self.on_each_database():
            with self.subTest(database), mock.patch.dict(os.environ, {"AUTH_DATABASE": database}):
                printed = f"1004 users imported into {server.parse_database(database)}\n"
                self.assertEqual(self.run_main("user", "import", typed="\ufeff" + lines), (0, printed, ""))
                self.assertEqual(self.run_main("user", "export"), (0, lines, ""))

    def test_lines_that_are_malformed_or_taken_refuse_the_import_and_add_no_user(self):
        self.store.add_user("alice", self.HASHES[0])
        good = self.LINE % ("bob", self.HASHES[1])
        for line, words in [
            ("bob", 'Line 2 is not {"username": …, "password_hash": …}'),
            ('{"username": "bob"}', "Line 2 is not"),
            ("[" * 100_000, "Line 2 is not"),
            (good.replace('"bob"', "1"), "Line 2: 1"),
            (good.replace('"bob"', '"\\ud800"'), r"Line 2: '\ud800'"),
            (self.LINE % ("eve", "hunter2"), "Line 2: 'eve'"),
            ('{"username": "eve", "password_hash": null}', "Line 2: 'eve'"),
            (
                self.LINE.replace("}", ', "roles": ["Admin"]}') % ("eve", self.HASHES[1]),
                "Line 2: 'Admin' is not a role",
            ),
            (self.LINE.replace("}", ', "roles": null}') % ("eve", self.HASHES[1]), "Line 2: None is not a role"),
            (good.replace("bob", "alice"), "'alice' exists already, or twice in the file"),
            (good, "'bob' exists already, or twice in the file"),
        ]:
            with self.subTest(line[:40]):
                words = re.escape(words) + ".*nothing was imported"
                self.assert_fails(["user", "import"], 1, words, typed=good + line)
                self.assertEqual([user.username for user in self.store.iter_users()], ["alice"])
        self.assert_fails(["user", "import"], 1, "Standard input holds no users; nothing was imported", typed="\n")
        skipped = self.run_main("user", "import", "--skip-existing", typed=good + good.replace("bob", "alice"))
        self.assertEqual(skipped, (0, f"1 users imported into {self.shown}, 1 skipped because they exist\n", ""))
        self.assertEqual(self.store.find_user("alice").password_hash, self.HASHES[0])


class DoctorTest(CommandLineCase):
    def test_doctor_and_commands_name_each_problem(self):
        self.run_main("key", "rotate")
        self.add_user()
        self.store.close()
        self.assertEqual(self.run_main("doctor"), (0, f"all is well with {self.shown}\n", ""))
        self.raw_sql("DROP TABLE user")
        self.raw_sql("DROP TABLE auth_session")
        self.raw_sql("CREATE TABLE user (id INTEGER PRIMARY KEY, username TEXT, password TEXT)")
        good = server.hash_password("x", 1)
        for row in [("plain", "roy"), (None, good), ("twin", good), ("twin", "!" + good)]:
            self.raw_sql("INSERT INTO user (username, password) VALUES (%s, %s)", *row)
        for name in ("auth.keys", "auth.db"):
            (self.folder / name).chmod(0o644)
        expected = [
            ".*auth.db is open to others; run: chmod 600",
            ".*auth.keys: open to others.*chmod 600",
            ".*no table auth_session, or an old one; run: server.py init",
            r"user 1 \('plain'\) has no usable hash; `user passwd` sets one",
            r"the username None cannot log in \(ids 2\)",
            r"the username 'twin' cannot log in \(ids 3, 4\); .*with SQL",
        ]
        status, printed, errors = self.run_main("doctor")
        self.assertEqual((status, errors), (1, ""))
        for line, words in zip(printed.splitlines(), expected, strict=True):
            self.assertRegex(line, f"^{words}")
        lines = ["3\ttwin\tpbkdf2:sha256:1\t0", "4\ttwin\tdisabled\t0"]
        lines = ["1\tplain\tno usable hash\t0", "2\t(no name)\tpbkdf2:sha256:1\t0", *lines]
        self.assertEqual(self.run_main("user", "list")[1].splitlines(), lines)
        _, exported, errors = self.run_main("user", "export")
        self.assertEqual([json.loads(line)["username"] for line in exported.splitlines()], ["twin", "twin"])
        self.assertRegex(errors, r"^user 1 \('plain'\) cannot log in, and is left out\nuser 2 \(None\) cannot")
        for action in ["add", "passwd", "remove"]:
            self.assert_fails(["user", action, "twin"], 1, r"2 users .*'twin' \(ids 3, 4\)", typed="correct horse\n")

    def test_doctor_looks_at_each_mysql_host(self):
        dead = free_port()
        refused = self.run_main("doctor", "--database", f"mysql://roy@127.0.0.1:{dead}/users")
        self.assertEqual(refused[::2], (1, ""))
        self.assertRegex(refused[1], f"^127.0.0.1:{dead}: .*refused.*AUTH_DATABASE")
        if mariadb:
            url = mariadb.url(self.new_database())
            self.run_main("init", "--database", url)
            self.assertRegex(self.run_main("doctor", "--database", url)[1], "^all is well with mysql://root@127")
            mariadb.run("SET GLOBAL read_only = 1")
            self.addCleanup(mariadb.run, "SET GLOBAL read_only = 0")
            printed = self.run_main("doctor", "--database", url.replace("/t", f",127.0.0.1:{dead}/t"))[1]
            self.assertRegex(printed, f"^127.0.0.1:{mariadb.port} is read-only; .*\n127.0.0.1:{dead}: .*refused")


# --- README ---


class ReadmeTest(MySQLCase):
    """The commands and examples of the README are run in a copy of the project, and their output is compared."""

    request = Service.request

    def setUp(self):
        super().setUp()
        for name in ("server.py", "schema.sql", "requirements.txt"):
            shutil.copy(HERE / name, self.folder)
        (self.folder / ".venv").symlink_to(sys.prefix)  # instead of an installation
        self.address, self.process = ("127.0.0.1", free_port()), None
        self.environment = clean_environment() | {"AUTH_PORT": str(self.address[1]), "PYTHONUNBUFFERED": "1"}
        self.addCleanup(self.stop)

    def blocks(self, language):
        """The code blocks of a language, with a free port in place of theirs and this folder in place of /srv."""
        text = README.replace("/srv/rest-auth", os.path.realpath(self.folder))
        text = re.sub(r"(127.0.0.1:|port=)(5000|808[01])", rf"\g<1>{self.address[1]}", text)
        return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", text)

    def bash(self, script):
        """The standard output of a script, which must succeed."""
        command, options = ["bash", "-e", "-c", script], {"capture_output": True, "text": True}
        done = subprocess.run(command, cwd=self.folder, env=self.environment, **options)
        self.assertEqual(done.returncode, 0, f"{script}\n{done.stdout}{done.stderr}")
        return done.stdout

    def start(self, command):
        self.stop()
        with open(self.folder / "log", "w") as log:
            options = {"cwd": self.folder, "env": self.environment, "stdout": subprocess.PIPE, "stderr": log}
            self.process = subprocess.Popen(["bash", "-c", f"exec {command}"], text=True, **options)

    def stop(self):
        if self.process:
            self.process.terminate()
            self.process.wait(30)
            self.process.stdout.close()
            self.process = None

    def fetch(self, path, token=None, body=None):
        """The JSON of a 200, else the status; None while the port is closed."""
        with contextlib.suppress(OSError):
            headers = FORM | (bearer(token) if token else {})
            status, _, text = self.request("POST" if body else "GET", path, body, **headers)
            return json.loads(text) if status == 200 else status

    def assert_prints(self, command, printed, shown):
        """Compare lines. `…` in the README stands for one word."""
        pattern = "\n".join(r"[\w./-]+".join(map(re.escape, line.split("…"))) for line in shown)
        self.assertRegex("\n".join(printed), f"^{pattern}$", command)

    def test_console_blocks_print_what_the_readme_shows(self):
        install = "python3 -m venv .venv && .venv/bin/pip install -q -r requirements.txt && "
        *consoles, development = self.blocks("console")
        self.assertEqual(development, f"$ {install}.venv/bin/python -m unittest\n")  # `.ci/run` runs this line
        for block in consoles:
            steps = [step.splitlines() for step in re.split(r"(?m)^\$ ", block.replace(install, ""))[1:]]
            serving = [step for step in steps if step[1:2] and step[1].startswith("rest-auth ")]
            others = [step for step in steps if step not in serving]
            outputs = self.bash("".join(f"{command}\necho END-OF-COMMAND\n" for command, *_ in others))
            for (command, *shown), printed in zip(others, outputs.split("END-OF-COMMAND\n"), strict=False):
                self.assert_prints(command, printed.splitlines(), shown)
            for command, *shown in serving:
                self.start(command)
                self.assert_prints(command, [self.process.stdout.readline().rstrip("\n") for _ in shown], shown)

    def test_python_examples_protect_their_routes(self):
        own, _flask = self.blocks("python")  # .ci/torture runs Flask and Django
        elsewhere = "from bottle import Bottle\nfrom server import JWTPlugin\napp = Bottle()\napp.install(%s)\n"
        elsewhere += "@app.get('/hello')\ndef hello(identity):\n    return {'hello': identity.id}\n"
        run, mount = (re.search(rf"`(app\.{name}\(.*?\))`", README)[1] for name in ("run", "mount"))
        plugin = r"JWTPlugin\((?:key_file|jwks_url)=.*?\)"
        sources = [f"{own}from reports import application\n{mount}\n{run.replace('8080', str(self.address[1]))}\n"]
        plugins = re.findall(f"`(?:app.install.)?({plugin})", README)
        sources += [f"{elsewhere % one}app.run(server='waitress', port={self.address[1]})\n" for one in plugins]
        (self.folder / "reports.py").write_text("application = lambda env, start: (start('200 OK', []), [b'1'])[1]\n")
        self.environment["AUTH_PBKDF2_ITERATIONS"] = "1"
        self.bash("echo 'correct horse' | .venv/bin/python server.py user add alice")
        self.bash(
            f".venv/bin/python server.py {re.search('`server.py (key rotate --alg ES256)`', README.replace(chr(10), ' '))[1]}"
        )
        hello = [({"hello": "alice"}, 401), ({"hello": 1}, 401), ({"hello": 1},) * 2, ({"hello": 1},) * 2]
        with Service(self.folder) as issuer:
            for source, (before_logout, after_logout) in zip(sources, hello, strict=True):
                (self.folder / "hello.py").write_text(source.replace("127.0.0.1:5000", "%s:%d" % issuer.address))
                self.start(".venv/bin/python hello.py")
                wait_for(lambda: self.fetch("/hello") == 401)
                token = issuer.login("alice", "correct horse")
                self.assertEqual(self.fetch("/hello", token), before_logout, source)
                if mount in source:
                    self.assertEqual([self.fetch("/reports/1"), self.fetch("/reports/1", token)], [401, 1])
                self.assertEqual(issuer.request("POST", "/auth/logout", **bearer(token))[0], 204)
                self.assertEqual(self.fetch("/hello", token), after_logout, source)

    def test_commands_for_flask_jwt_several_hosts_and_granian_work(self):
        self.raw_sql(TUTORIAL_TABLE)
        self.raw_sql("INSERT INTO user (username, password) VALUES ('roy', %s)", TUTORIAL_HASH)
        command = re.search(r"`(AUTH_DATABASE='mysql://.* \.venv/bin/python server\.py)`", README)[1]
        command = re.sub("mysql://.*?(?=')", self.database, command).replace("JWT_SECRET_KEY", SECRET)
        self.start(f"env {command}")
        self.assertIn("HS256 key in AUTH_SECRET_KEY", self.process.stdout.readline())
        self.assertIn("access_token", self.fetch("/auth", body="username=roy&password=roy"))
        self.assertIsInstance(self.fetch("/rest-auth", self.token()), str)  # as the old app signed it
        url = re.search(r"`AUTH_DATABASE=(mysql://\S+,\S+)`", README)[1]
        self.assertEqual([host for host, _ in server.parse_database(url).hosts], ["10.0.0.1", "10.0.0.2", "10.0.0.3"])
        granian = r"`AUTH_THREADS=(\d+) \S+/granian --interface wsgi --blocking-threads \1 .*server:app`"
        self.assertRegex(README.replace("\n", " "), granian)

    def below(self, script):
        script = re.sub(r"(?<![\w.])/(?=(opt|var|etc|usr|root)\b)", f"{self.folder}/", script)
        script = script.replace(" -o rest-auth -g rest-auth", "").replace("runuser -u rest-auth -- ", "")
        return "apt() { :; }; useradd() { :; }; systemctl() { :; }\n" + script

    def task(self, name):
        [cell] = re.findall(rf"(?m)^\| {name}.*? \| (.*) \|$", README)
        return [self.below(command) for command in re.findall("`(.*?)`", cell)]

    def test_installed_service_runs_behind_nginx_and_is_backed_up_restored_and_moved(self):
        if not program("nginx") or not program("sqlite3"):
            self.skipTest("nginx or sqlite3 is missing: apt install nginx-light sqlite3")
        folders = "etc/systemd/system etc/ssl/private etc/ssl/certs usr/local/sbin root var/lib opt/rest-auth"
        self.bash(f"mkdir -p {folders}; ln -s {sys.prefix} opt/rest-auth/.venv")
        path = f"{self.folder}/usr/local/sbin:{os.environ['PATH']}"
        self.environment |= {"PATH": path, "AUTH_PBKDF2_ITERATIONS": "1"}
        walk = re.sub(r"(?m)^python3 -m venv .*", "", self.blocks("sh")[0])
        self.bash(self.below(walk.replace("rest-auth user add", "echo 'correct horse' | rest-auth user add")))
        unit = (self.folder / "etc/systemd/system/rest-auth.service").read_text()
        self.assertIn("[Install]\nWantedBy=multi-user.target\n", unit)
        command, folder = (re.search(f"(?m)^{name}=(.*)", unit)[1] for name in ("ExecStart", "WorkingDirectory"))
        self.start(f"bash -c 'set -a; . {self.folder}/etc/rest-auth.env; cd {folder}; exec {command}'")
        self.assertIn(f"{self.folder}/var/lib/rest-auth/auth.db", self.process.stdout.readline())
        tls, site = free_port(), self.blocks("nginx")[0].replace("127.0.0.1:8000", "rest_auth")
        site = site.replace("/etc/ssl", f"{self.folder}/etc/ssl").replace("listen ", f"listen 127.0.0.1:{tls} ssl; #")
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
            site = f"{name}_temp_path {self.folder}/{name};\n{site}"
        main = f"pid {self.folder}/pid; error_log {self.folder}/log.nginx; daemon off; events {{}}\n"
        main += "user root;\n" if os.geteuid() == 0 else ""
        (self.folder / "nginx.conf").write_text(f"{main}http {{ access_log off;\n{site} }}\n")
        nginx = subprocess.Popen([program("nginx"), "-p", self.folder, "-c", self.folder / "nginx.conf"])
        self.addCleanup(nginx.wait)
        self.addCleanup(nginx.terminate)
        curl = f"curl -sk https://127.0.0.1:{tls}"
        wait_for(lambda: '"ok"' in self.bash(f"{curl}/health || true"))
        tokens = self.bash(f"{curl}/auth -H 'X-Forwarded-For: 192.0.2.1' -d username=alice -d 'password=correct horse'")
        header = f"-H 'Authorization: Bearer {json.loads(tokens)['access_token']}'"
        self.assertIn('"ip_address": "127.0.0.1"', self.bash(f"{curl}/auth/me {header}"))  # by the trusted proxy
        for arguments, status in [("", "401"), (header, "404"), (f"{header} -d a=b", "404")]:  # 404 is from the app
            self.assertEqual(self.bash(f"{curl}/app/ {arguments} -o /dev/null -w '%{{http_code}}'"), status)
        modes = self.bash(f"{self.task('back up')[0]}; stat -c %a root/auth.db root/auth.keys")
        self.assertEqual(modes, "600\n600\n")
        self.bash("echo 'correct horse' | rest-auth user add bob")
        self.stop()
        listed = self.bash(f"{self.task('restore')[0]}; rest-auth user list")
        self.assertEqual(listed, "1\talice\tpbkdf2:sha256:1\t0\n")
        export, _, _, load, _ = self.task("move the users")
        self.bash(f"{export}; sed -i \"s|^AUTH_DATABASE=.*|AUTH_DATABASE='{self.database}'|\" etc/rest-auth.env")
        self.assertIn("1 users imported into mysql://", self.bash(load))
        self.assertIn("access_token", self.service.login("alice", "correct horse", time.time()))


if __name__ == "__main__":
    unittest.main()
