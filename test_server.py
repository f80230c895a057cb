"""Tests of server.py, room by room. Store, sign-in and HTTP tests run on SQLite and on a private MariaDB."""

import ast
import base64
import concurrent.futures
import contextlib
import dataclasses
import datetime
import functools
import getpass
import hashlib
import hmac
import http.client
import io
import itertools
import json
import logging
import os
import pwd
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import ssl
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

import bottle
import jwt
import pymysql
import waitress
import webtest

import server
from server import Conflict, JWTPlugin, KeySet, Settings, SettingsError, make_app, verify_password

HERE = Path(__file__).parent
README = (HERE / "README.md").read_text("utf-8")
SECRET = "a secret of the tests, which is long enough for HS512 as well: it has 80 bytes.."
NOW = 1_800_000_000  # seconds since 1970, for every test that needs a clock

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
    """The environment without settings of the service."""
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
        self.port = free_port()
        self.socket = f"{self.folder}/socket"
        self.databases = 0
        data = f"{self.folder}/data"
        owner = []
        if os.geteuid() == 0:
            shutil.chown(self.folder, *pwd.getpwnam("nobody")[2:4])
            owner = ["--user=nobody"]
        daemon = program("mariadbd", "mysqld")
        install = program("mariadb-install-db")
        make = [install, "--auth-root-authentication-method=normal", "--skip-test-db"] if install else [daemon]
        make += ["--no-defaults", f"--datadir={data}", *owner] + ([] if install else ["--initialize-insecure"])
        make.insert(1, make.pop(make.index("--no-defaults")))  # where it has to stand
        subprocess.run(make, check=True, capture_output=True)
        authority = make_authority(self.folder)
        self.command = [daemon, "--no-defaults", f"--datadir={data}", f"--socket={self.socket}", f"--port={self.port}"]
        self.command += [
            "--bind-address=127.0.0.1",
            "--innodb-flush-log-at-trx-commit=0",
            "--sql-mode=",
            "--transaction-isolation=READ-COMMITTED",
            *owner,
            *authority,
            *options,
        ]
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


def make_authority(folder):
    """A certificate authority and a server certificate for localhost; the server's options that use them."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    today = datetime.datetime.now(datetime.timezone.utc)
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ca", "server")}
    names = {name: x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"test {name}")]) for name in keys}
    for name, key in keys.items():
        builder = x509.CertificateBuilder(names["ca"], names[name], key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(today - datetime.timedelta(1)).not_valid_after(today + datetime.timedelta(1))
        builder = builder.add_extension(x509.BasicConstraints(name == "ca", None), critical=True)
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(keys["ca"].public_key())
        builder = builder.add_extension(identifier, False).add_extension(issuer, False)
        certificate = builder.sign(keys["ca"], hashes.SHA256())
        Path(folder, f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        Path(folder, f"{name}-key.pem").write_bytes(pem)
    return [f"--ssl-ca={folder}/ca.pem", f"--ssl-cert={folder}/server.pem", f"--ssl-key={folder}/server-key.pem"]


def setUpModule():
    global mariadb
    mariadb = None
    logging.getLogger("auth").addHandler(logging.NullHandler())
    logging.getLogger("auth").propagate = False
    if program("mariadbd", "mysqld"):
        mariadb = MariaDB()
        unittest.addModuleCleanup(mariadb.stop)
    elif os.environ.get("CI"):
        raise AssertionError("no MariaDB here: apt install mariadb-server")


class Case(unittest.TestCase):
    """A temporary folder to work in, and settings, sign-in, app and WebTest client made when first asked for."""

    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="rest-auth-test-"))
        self.addCleanup(shutil.rmtree, self.folder)
        self.database = f"sqlite:///{self.folder}/auth.db"

    def new_database(self):
        """The name of an empty database in MariaDB, for this test."""
        name = mariadb.new_database()
        self.addCleanup(mariadb.run, f"DROP DATABASE {name}")
        return name

    def on_each_database(self):
        """The URL of an empty database on each engine."""
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
    def sign_in(self):
        sign_in = server.open_sign_in(self.settings)
        self.addCleanup(sign_in.close)
        return sign_in

    @property
    def store(self):
        return self.sign_in.store

    @functools.cached_property
    def app(self):
        return make_app(self.settings, self.sign_in)

    @functools.cached_property
    def client(self):
        return webtest.TestApp(self.app)

    def add_user(self, username="alice", password="correct horse"):
        return self.store.add_user(username, server.hash_password(password, 1))

    def login(self, username="alice", password="correct horse"):
        return self.client.post_json("/auth", {"username": username, "password": password}).json["access_token"]

    def get(self, path, token, **options):
        return self.client.get(path, headers={"Authorization": f"Bearer {token}"}, **options)

    def assert_refused(self, answer, status, error, description=None):
        self.assertEqual(answer.status_int, status, answer.text)
        self.assertEqual(answer.content_type, "application/json")
        self.assertEqual(list(answer.json), ["status_code", "error", "description"])
        self.assertEqual((answer.json["status_code"], answer.json["error"]), (status, error))
        if description is not None:
            self.assertEqual(answer.json["description"], description)
        self.assertNotRegex(answer.text, r"Traceback|\.py|SELECT|sqlite|pymysql|sys\.|recursion|codec")

    def token(self, secret=SECRET, algorithm="HS256", headers=None, **changes):
        """A token good now for user 1, with claims changed, or left out where a change is None."""
        now = int(time.time())
        claims = {"exp": now + 300, "iat": now, "nbf": now, "identity": 1} | changes
        claims = {name: value for name, value in claims.items() if value is not None}
        return jwt.encode(claims, secret, algorithm, headers)


class MySQLCase(Case):
    def setUp(self):
        super().setUp()
        if mariadb is None:
            self.skipTest("no MariaDB or MySQL here: apt install mariadb-server")
        self.name = self.new_database()
        self.database = mariadb.url(self.name)

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
        inherited = clean_environment()
        self.errors = open(Path(folder) / "errors", "w+", encoding="utf-8")
        command = [sys.executable, HERE / "server.py", "--port", "0", *arguments]
        if listener:  # as systemd passes one on
            script = f'exec 3<&{listener.fileno()}; export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@"'
            command = ["bash", "-c", script, "bash", *command]
        self.process = subprocess.Popen(
            command,
            pass_fds=[listener.fileno()] if listener else [],
            cwd=folder,
            env=inherited | {"AUTH_PBKDF2_ITERATIONS": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def __enter__(self):
        self.banner = self.process.stdout.readline()
        found = re.search(r"http://(\S+):(\d+)", self.banner)
        if not found:
            self.__exit__()
            raise AssertionError(f"no start: {self.banner}{self.log}")
        self.address = found[1].strip("[]"), int(found[2])
        return self

    def __exit__(self, *_):
        self.stop(signal.SIGTERM)
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
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
            received = b""
            with contextlib.suppress(OSError):  # it may refuse, and close, before it has read all
                connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionResetError):
                while data := connection.recv(65536):
                    received += data
            return received

    def login(self, username, password):
        status, _, text = self.request("POST", "/auth", urllib.parse.urlencode(locals_of(username, password)), **FORM)
        return json.loads(text)["access_token"] if status == 200 else status


FORM = {"Content_Type": "application/x-www-form-urlencoded"}


def locals_of(username, password):
    return {"username": username, "password": password}


# --- Settings ---


class SettingsTest(unittest.TestCase):
    def test_a_flag_beats_the_variable_and_the_variable_beats_the_default(self):
        environ = {"AUTH_TOKEN_TTL": "60", "AUTH_LEEWAY": "", "HOME": "/"}
        self.assertEqual(Settings.load(environ).token_ttl, 60)
        self.assertEqual(Settings.load(environ, token_ttl="90").token_ttl, 90)
        self.assertEqual(Settings.load(environ).leeway, Settings.leeway)

    def test_a_wrong_setting_is_refused_with_its_name(self):
        for environ, words in [
            ({"AUTH_TOKN_TTL": "60"}, "AUTH_TOKN_TTL is no setting; did you mean AUTH_TOKEN_TTL"),
            ({"AUTH_TOKEN_TTL": "soon"}, "token_ttl: 'soon' is not a whole number"),
            ({"AUTH_TOKEN_TTL": "0"}, "token_ttl: 0 is not between 1 and"),
            ({"AUTH_PORT": "65536"}, "port: 65536"),
            ({"AUTH_REALM": 'a"b'}, "realm"),
            ({"AUTH_DATABASE": "sqlite://", "AUTH_PROCESSES": "2"}, "processes: a database in memory"),
            ({"AUTH_METRICS": "here"}, "metrics: give a port, such as 9100"),
            ({"AUTH_METRICS": "example.com:9100"}, "metrics: give a port"),
            ({"AUTH_METRICS": "70000"}, "metrics: give a port"),
            ({"AUTH_METRICS": "0"}, "metrics: give a port"),
            ({"AUTH_SECRET_KEY": "secret-key"}, "published.*secrets.token_urlsafe"),
            ({"AUTH_SECRET_KEY": "a-string-secret-at-least-256-bits-long"}, "published"),
            ({"AUTH_SECRET_KEY": "x" * 31}, "shorter than 32 bytes.*secrets.token_urlsafe"),
            ({"AUTH_SECRET_KEY": "secret-key" * 4}, "repeats itself.*secrets.token_urlsafe"),
        ]:
            with self.subTest(environ), self.assertRaisesRegex(SettingsError, words):
                Settings.load(environ)

    def test_a_value_of_another_type_is_refused(self):
        for values in [{"port": "5000"}, {"port": True}, {"host": None}, {"secret_key": b"x" * 32}]:
            with self.subTest(values), self.assertRaises(SettingsError):
                Settings(**values)

    def test_no_secret_in_the_repr(self):
        settings = Settings(database="mysql://roy:tell-nobody@db/users", secret_key=SECRET)
        self.assertNotIn("tell-nobody", repr(settings) + str(server.parse_database(settings.database)))
        self.assertNotIn(SECRET, repr(settings))

    def test_database_urls(self):
        for url, expected in [
            ("sqlite://", ("sqlite", "", "", "", (), {})),
            ("sqlite:///:memory:", ("sqlite", "", "", "", (), {})),
            ("sqlite:///auth.db", ("sqlite", "auth.db", "", "", (), {})),
            ("sqlite:////var/lib/a%20b.db", ("sqlite", "/var/lib/a b.db", "", "", (), {})),
            ("mysql://roy@db/users", ("mysql", "users", "roy", "", (("db", 3306),), {})),
            ("mysql://r%40y:p%2F%3A@[::1]:1,b/u", ("mysql", "u", "r@y", "p/:", (("::1", 1), ("b", 3306)), {})),
            ("mysql://r@/u?unix_socket=/s", ("mysql", "u", "r", "", (("localhost", 3306),), {"unix_socket": "/s"})),
            ("mysql://r@h/u?ssl_key=k", ("mysql", "u", "r", "", (("h", 3306),), {"ssl_key": "k"})),
        ]:
            with self.subTest(url):
                self.assertEqual(dataclasses.astuple(server.parse_database(url)), expected)

    def test_a_bad_database_url_is_refused_and_not_repeated(self):
        for url in [
            "",
            "auth.db",
            "postgres://roy:hunter2@db/users",
            "sqlite:/auth.db",
            "sqlite://auth.db",
            "mysql://roy:hunter2@db",
            "mysql://:hunter2@db/users",
            "mysql://roy:hunter2@db:port/users",
            "mysql://roy:hunter2@db/users?ssl=hunter2",
            "mysql://roy:hunter2@db/users?read_timeout=hunter2",
            "mysql://roy:hunter2@[db/users",
            "mysql://roy:hunter2#4@db/users",
            "mysql://roy:a@b/c?hunter2@host/db",
            "sqlite:///",
            "sqlite:///a%00b",
            "mysql://roy:hunter2@db/users?ssl_verify_identity=hunter2",
        ]:
            with self.subTest(url), self.assertRaises(SettingsError) as caught:
                Settings(database=url)
            self.assertNotIn("hunter2", str(caught.exception))


# --- Passwords ---


class PasswordsTest(unittest.TestCase):
    VECTORS = [  # (stored, password)
        (TUTORIAL_HASH, "roy"),
        # werkzeug 2.3.8, generate_password_hash(password, method=…)
        ("pbkdf2:sha1:1000$RcSRquBkVldd3xb0$b6e8088ccd123e5dc381c6cd444428da3b29fa7c", "correct horse"),
        (
            "pbkdf2:sha256:260000$NhUF6mJKHzjaOyci$7093e55c426fa2618375c68aeffaaded07107f6e0491faf472ce7733087ec728",
            "correct horse",
        ),
        (
            "pbkdf2:sha512:1000$ymryLIfRCssixT9n$155e44d5291196679a50938927981b35e3ab7f3d14d1e60e84fe192f606b93fac8be0e06"
            "eeb85b03e1d37d5b1d9c2bf7827b2e3eaf617d49ee6115b3c73d09f8",
            "correct horse",
        ),
        (
            "scrypt:32768:8:1$2wDmXwy6Of829ScA$145d7f5a6800460f6a50f6d59d84f7d3270d3e9e6d44ef9d23406263f134981810db6254d6"
            "bb6c5d78025039d842326aaba2ad1cd088269cda7c4265a16d1673",
            "correct horse",
        ),
        (
            "pbkdf2:sha256:1000$lKv91hspsJYiNz71$23feb20af40940977a40011bc3373dd24997f1443cfb984cf4ab9a775caeba6b",
            "pässwörd ☃",
        ),
        # werkzeug 3.1.9: its default, and method="pbkdf2"
        (
            "scrypt:32768:8:1$kmldqdEyw0ioShaG$e0a2eecfeaaa6dde2c0614280a6e631d0b61adf0938ee0d512ebb8fcd491face19deca0db2"
            "4efa658c30e22ae2e9b287a7051481a6852535db85a614d764d99a",
            "correct horse",
        ),
        (
            "pbkdf2:sha256:1000000$Agl0ckX5rQ4TliaU$36b3fb4e6056fb8cbf9c92bc951598dad86231859165d9f94daea7cdebac3a59",
            "correct horse",
        ),
        # Django 5.2.19, make_password(password)
        ("pbkdf2_sha256$1000000$havf2BK4C6TBLNtYYg7f8c$ARTlA5z+gLmokNlMO6PuKn/LLBeuhy3qWI/mB8PpdPc=", "correct horse"),
    ]

    def test_a_hash_that_costs_too_much_is_none(self):
        """Whoever knows the name of its user could have the service compute it, again and again."""
        for costs, is_read in [
            ("32768:8:1", True),
            ("131072:8:4", True),
            ("131072:8:5", False),
            ("131072:15:9", False),
        ]:
            self.assertEqual(server.read_hash(f"scrypt:{costs}$salt${'0' * 128}") is not None, is_read, costs)

    def test_hashes_of_other_programs_verify(self):
        for stored, password in self.VECTORS:
            with self.subTest(stored[:30]):
                self.assertTrue(verify_password(stored, password))
                self.assertFalse(verify_password(stored, password.title()))

    def test_a_hash_that_is_none_is_false(self):
        tail = "$k1Ud5dzh$d0347f416e89ea486b33c988c9be65730329b2dd6d712f73c9920103a006a82e"
        for stored in [
            *(None, "", "roy", 0, b"pbkdf2", "$", "$$", "!", "plain$$roy", f"!{TUTORIAL_HASH}", f"{TUTORIAL_HASH}\n"),
            *(TUTORIAL_HASH[:-2], TUTORIAL_HASH[:-1], TUTORIAL_HASH + "00", TUTORIAL_HASH.replace("sha256", "md5")),
            *("pbkdf2:sha256" + tail, "pbkdf2:sha256:0" + tail, "pbkdf2:sha256:-1" + tail, "pbkdf2:sha256:x" + tail),
            *("pbkdf2:sha256:99999999999" + tail, "pbkdf2:sha256:١" + tail, "pbkdf2:sha256:1$salt$", "pbkdf2:::$a$b"),
            *("pbkdf2:sha256:1$salt$zz", "scrypt:3:8:1$salt$" + "0" * 128, "scrypt:9999999:99:9$s$" + "0" * 128),
            *("pbkdf2_sha256$1$salt$AAAA", "pbkdf2_sha256$1$salt$====", "pbkdf2_sha1$1$s$ifF+CUuu9Z79Tm+qWi39BQKMxX0="),
            "pbkdf2:sha256:1$\ud800$" + "0" * 64,
        ]:
            with self.subTest(stored=stored):
                self.assertIs(verify_password(stored, "roy"), False)

    def test_hash_password_writes_werkzeugs_format_with_a_new_salt_each_time(self):
        first, second = (server.hash_password("correct horse", 2) for _ in range(2))
        self.assertRegex(first, r"^pbkdf2:sha256:2\$[0-9a-f]{32}\$[0-9a-f]{64}$")
        self.assertNotEqual(first, second)
        self.assertTrue(verify_password(first, "correct horse"))
        self.assertTrue(server.hash_password("x").startswith(f"pbkdf2:sha256:{Settings.pbkdf2_iterations}$"))

    def test_needs_rehash(self):
        for stored, expected in [
            (server.hash_password("x", 2), False),
            (server.hash_password("x", 3), False),
            (server.hash_password("x", 1), True),
            (self.VECTORS[3][0], True),
            (self.VECTORS[-1][0], True),
            (self.VECTORS[4][0], True),
            ("", True),
        ]:
            with self.subTest(stored[:30]):
                self.assertIs(server.needs_rehash(stored, 2), expected)

    def test_a_hash_of_another_method_counts_as_the_rounds_that_take_as_long(self):
        self.assertEqual(server.cost_of(TUTORIAL_HASH), 150_000)
        for stored in [None, "", f"!{TUTORIAL_HASH}", "scrypt:3:8:1$salt$" + "0" * 128]:
            self.assertLess(server.cost_of(stored), 100, stored)
        for stored, method in [(self.VECTORS[3][0], "sha512"), (self.VECTORS[1][0], "sha1")]:
            ratio = server.seconds_of(f"pbkdf2:{method}") / server.seconds_of("pbkdf2:sha256")
            self.assertEqual(server.cost_of(stored), round(1000 * ratio))
        scrypt = server.cost_of(self.VECTORS[4][0])
        self.assertGreater(scrypt, 1000)
        for cost, hashed in [(scrypt, self.VECTORS[4][0]), (2000, server.hash_password("x", 2000))]:
            with mock.patch("hashlib.pbkdf2_hmac", wraps=hashlib.pbkdf2_hmac) as hashing:
                self.assertFalse(verify_password(hashed, "y", cost + 777))
            self.assertEqual(hashing.call_args.args[3], 777)

    def test_the_same_rounds_are_spent_whatever_the_hash(self):
        for stored in [None, "", "malformed", server.hash_password("x", 1), server.hash_password("x", 700)]:
            with mock.patch("hashlib.pbkdf2_hmac", wraps=hashlib.pbkdf2_hmac) as hashing, self.subTest(stored=stored):
                self.assertFalse(verify_password(stored, "y", 1000))
                rounds = [call.kwargs.get("iterations") or call.args[3] for call in hashing.call_args_list]
                self.assertEqual(sum(rounds), 1000)


# --- Store ---


@on_each_engine
class StoreTest:
    def test_users_are_added_found_listed_and_removed(self):
        first, second = self.add_user("alice"), self.add_user("bob")
        self.assertEqual([user.username for user in self.store.list_users()], ["alice", "bob"])
        self.assertEqual(self.store.find_user("bob"), self.store.get_user(second))
        self.assertTrue(self.store.remove_user(first))
        self.assertFalse(self.store.remove_user(first))
        self.assertIsNone(self.store.find_user("alice"))
        self.assertIsNone(self.store.get_user(first))

    def test_a_name_is_found_only_as_it_was_typed(self):
        self.add_user("alice")
        for name in ["ALICE", "alice ", " alice", "álice", "alicé", "al_ce", "%", "", "alice\0", "' OR ''='", "日本"]:
            with self.subTest(name):
                self.assertIsNone(self.store.find_user(name))

    def test_names_in_every_alphabet(self):
        for name in ["Ærøskøbing", "日本語", "😀", "O'Brien", 'a"b\\c', "x" * 255]:
            with self.subTest(name):
                self.assertEqual(self.store.find_user(name), None)
                self.add_user(name)
                self.assertEqual(self.store.find_user(name).username, name)

    def test_a_session_and_its_user_are_read_as_they_were_stored(self):
        for name in ["O'Brien", 'a"b\\c', "日本語😀", "tab\tline\nnul\0", "x" * 255, ""]:
            with self.subTest(name):
                username = name.replace("\0", "") or "nobody"
                user_id = self.store.add_user(username, f"hash of {username[:9]}")
                session = self.sign_in._new_session(user_id, name, "2001:db8::1", NOW)
                session = dataclasses.replace(session, expires=2**53 - 1)
                self.assertTrue(self.store.add_session(session, f"hash of {username[:9]}"))
                self.assertEqual(self.store.get_session(session.id, NOW), (session, self.store.get_user(user_id)))

    def test_a_taken_name_is_a_conflict_and_changes_nothing(self):
        self.add_user("alice")
        before = self.store.list_users()
        with self.assertRaisesRegex(Conflict, "There is a user 'alice' already"):
            self.add_user("alice", "another")
        self.assertEqual(self.store.list_users(), before)

    def test_of_many_who_add_one_name_at_once_one_succeeds(self):
        def add(_):
            with contextlib.suppress(server.AuthError):
                return self.add_user("alice")

        self.store.prepare()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            added = [user_id for user_id in pool.map(add, range(16)) if user_id]
        self.assertEqual(len(added), 1)
        self.assertEqual(self.raw_sql("SELECT COUNT(*) FROM user"), [(1,)])

    def test_a_hash_is_replaced_only_where_it_is_still_the_one_that_was_read(self):
        self.add_user("alice")
        read = self.store.find_user("alice")
        self.assertTrue(self.store.set_password(read, "newer"))
        self.assertFalse(self.store.set_password(read, "upgrade of the older"))
        self.assertEqual(self.store.find_user("alice").password_hash, "newer")

    def test_an_id_is_not_used_again(self):
        first = self.add_user("alice")
        self.store.remove_user(first)
        self.assertNotEqual(self.add_user("bob"), first)

    def test_preparing_twice_changes_nothing(self):
        self.add_user("alice")
        self.store.prepare()
        self.assertEqual(len(self.store.list_users()), 1)

    def test_a_transaction_that_fails_leaves_nothing(self):
        self.store.prepare()
        with self.assertRaises(ZeroDivisionError), self.store.transaction() as run:
            run("INSERT INTO user (username, password) VALUES (?, ?)", "alice", "x")
            raise ZeroDivisionError
        self.assertEqual(self.store.list_users(), [])

    def test_a_table_without_the_columns_is_refused_at_the_start(self):
        self.raw_sql("CREATE TABLE user (id INTEGER PRIMARY KEY, name VARCHAR(10))")
        with self.assertRaisesRegex(SettingsError, "username"):
            server.open_sign_in(self.settings)

    def test_connections_are_not_carried_over_a_fork(self):
        self.add_user()
        before = list(self.store._idle)
        self.assertTrue(before)
        for close_first in (False, True):
            with self.store.transaction() as run, warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # fork and threads: the child only reads, and ends
                self.assertEqual(len(run("SELECT id FROM user").fetchall()), 1)
                child = os.fork()
                if child == 0:
                    status = 1
                    with contextlib.suppress(BaseException):
                        if close_first:
                            self.store.close()
                        found = self.store.find_user("alice")
                        status = 0 if found and not set(map(id, before)) & set(map(id, self.store._idle)) else 1
                        self.store.close()
                    os._exit(status)
                self.assertEqual(os.waitpid(child, 0)[1], 0)
                self.assertEqual(len(run("SELECT id FROM user").fetchall()), 1)
        self.assertEqual(len(self.store.list_users()), 1)

    def test_each_read_sees_what_others_have_committed(self):
        self.add_user()
        for name in ["bob", "carol"]:
            self.assertIsNone(self.store.find_user(name))
            self.raw_sql("INSERT INTO user (username, password) VALUES (%s, 'x')", name)
            self.assertTrue(self.store.find_user(name))

    def test_a_database_that_fails_leaks_no_connection(self):
        self.add_user()
        self.store.close()
        if self.database.startswith("sqlite"):
            (self.folder / "auth.db").write_bytes(b"x" * 5000)
        else:
            self.store.database = dataclasses.replace(self.store.database, name="nowhere")
        count = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            with self.assertRaises(server.Unavailable):
                self.store.ping()
        self.assertLessEqual(len(os.listdir("/proc/self/fd")), count + 1)

    def test_the_password_hash_is_not_in_the_repr(self):
        self.add_user("alice")
        self.assertNotIn("pbkdf2", repr(self.store.find_user("alice")))


class SQLiteTest(Case):
    def test_the_version_is_another_after_each_commit_by_anybody_and_only_then(self):
        self.add_user()
        before = self.store.version(NOW)
        self.assertEqual(len(before[1]), 48)
        self.store.find_user("alice")
        self.raw_sql("DELETE FROM user WHERE id = 99")
        self.assertEqual(self.store.version(NOW), before)
        seen = {before}
        command = [
            sys.executable,
            "-c",
            "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute(sys.argv[2]); c.commit()",
        ]
        update = "UPDATE user SET password = password || 'x'"
        for commit in [
            lambda: self.raw_sql(update),
            lambda: self.add_user("bob"),
            lambda: subprocess.run([*command, self.folder / "auth.db", update], check=True),
            lambda: self.raw_sql("PRAGMA wal_checkpoint(TRUNCATE)") and self.raw_sql(update),
        ]:
            commit()
            self.assertNotIn(self.store.version(NOW), seen)
            seen.add(self.store.version(NOW))

    def test_an_index_that_begins_anew_is_another_version(self):
        """SQLite removes it with the last connection; the next begins with the same header."""
        self.add_user()
        token = self.sign_in.login("alice", "correct horse", NOW)["access_token"]
        self.store.close()
        identity, _ = self.sign_in.authenticate(token, NOW)
        before = self.store.version(NOW)
        self.sign_in.logout(identity, "local")
        self.store._close_idle()
        self.assertNotEqual(self.store.version(NOW), before)
        with self.assertRaises(server.SessionEnded):
            self.sign_in.authenticate(token, NOW)

    def test_looking_at_the_version_costs_sqlite_no_lock(self):
        """Or the next process to open the database would cut the WAL index off, and this one would die of SIGBUS."""

        def locks():
            inode = (self.folder / "auth.db-shm").stat().st_ino
            lines = Path("/proc/locks").read_text().splitlines()
            return [line for line in lines if f" {os.getpid()} " in line and f":{inode} " in line]

        self.add_user()
        self.assertEqual(len(locks()), 1)
        self.assertTrue(self.store.version(NOW))
        self.assertEqual(len(locks()), 1)
        with contextlib.closing(server.open_sign_in(self.settings)) as other:
            self.assertTrue(other.store.version(NOW))
        self.assertEqual(len(locks()), 1)

    def test_without_a_wal_index_each_request_reads(self):
        store = server.Store.open(Settings(database="sqlite://"))
        store.prepare()
        self.assertIsNone(store.version(NOW))
        store.close()

    def test_files_are_the_owners_own(self):
        self.add_user()
        self.assertGreater(len(list(self.folder.glob("auth.db*"))), 1)
        for path in self.folder.glob("auth.db*"):
            self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o600, path)

    def test_write_ahead_log_and_full_durability(self):
        with self.store.transaction() as run:
            self.assertEqual(run("PRAGMA journal_mode").fetchone(), ("wal",))
            self.assertEqual(run("PRAGMA synchronous").fetchone(), (2,))

    def test_memory_is_one_database_for_all_threads_and_gone_at_the_end(self):
        self.settings = dataclasses.replace(self.settings, database="sqlite://")
        self.store.prepare()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            self.assertEqual(len(set(pool.map(self.add_user, map(str, range(50))))), 50)
            self.assertTrue(all(pool.map(self.store.find_user, map(str, range(50)))))
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_a_damaged_row_is_somebody_who_cannot_sign_in(self):
        self.add_user()
        self.raw_sql("UPDATE user SET password = CAST(x'ff00fe' AS TEXT)")
        self.assertEqual(len(self.store.list_users()), 1)
        with self.assertRaises(server.InvalidCredentials):
            self.sign_in.login("alice", "correct horse", NOW)

    def test_a_file_that_is_no_database_or_cannot_be_opened(self):
        (self.folder / "text").write_text("no database, though it is long enough to look like one\n" * 50)
        for path in [self.folder / "text", self.folder / "no-folder" / "auth.db", self.folder]:
            with self.subTest(path), self.assertRaisesRegex(SettingsError, "writable"):
                server.open_sign_in(dataclasses.replace(self.settings, database=f"sqlite:///{path}"))

    def test_a_link_to_a_file_that_is_not_there_yet_and_a_change_of_folder(self):
        (self.folder / "link.db").symlink_to(self.folder / "real.db")
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        store = server.Store.open(Settings(database="sqlite:///link.db"))
        os.chdir("/")
        store.prepare()
        store.close()
        self.assertEqual(stat.S_IMODE((self.folder / "real.db").stat().st_mode), 0o600)

    def test_many_first_starts_at_once(self):
        start = functools.partial(server.open_sign_in, self.settings)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(start) for _ in range(8)]:
                future.result().close()


class MySQLTest(MySQLCase):
    def test_a_dead_connection_is_replaced_without_a_word(self):
        self.add_user()
        for statement in ("find", "add"):
            for (connection,) in mariadb.run("SELECT id FROM information_schema.processlist WHERE db = %s", self.name):
                mariadb.run(f"KILL {connection}")
            with self.subTest(statement), self.assertNoLogs("auth", "ERROR"):
                found = self.store.find_user("alice") if statement == "find" else self.add_user("bob")
                self.assertTrue(found)

    def test_threads_share_few_connections_and_close_ends_them(self):
        self.add_user()
        count = functools.partial(
            self.raw_sql,
            "SELECT COUNT(*) FROM information_schema.processlist WHERE db = %s AND command = 'Sleep'",
            self.name,
        )
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            self.assertTrue(all(pool.map(self.store.find_user, ["alice"] * 40)))
        self.assertLessEqual(count()[0][0], 4)
        self.store.close()
        wait_for(lambda: count() == [(0,)])

    def test_an_account_that_may_not_make_tables_is_told_what_to_run(self):
        mariadb.run("CREATE OR REPLACE USER reader@localhost IDENTIFIED BY 'p/:@%?#ü'")
        mariadb.run(f"GRANT SELECT ON {self.name}.* TO reader@localhost")
        self.database = mariadb.url(self.name, "reader", "p/:@%?#ü", unix_socket=mariadb.socket)
        with self.assertRaisesRegex(SettingsError, rf"run as one who may: mariadb {self.name} < \S+/schema.sql"):
            server.open_sign_in(self.settings)

    def test_a_password_that_is_wrong_and_a_server_that_is_not_there(self):
        warnings.simplefilter("ignore", ResourceWarning)  # PyMySQL leaves a unix socket that it could not connect to gc
        for url, words in [
            (mariadb.url(self.name, "root", "wrong"), "Access denied"),
            (f"mysql://root@127.0.0.1:{free_port()}/{self.name}", "refused"),
            (mariadb.url("nowhere"), "Unknown database"),
            (mariadb.url(self.name, ssl_ca="/nowhere.pem"), "No such file"),
            (mariadb.url(self.name, unix_socket="/nowhere"), "/nowhere"),
        ]:
            with self.subTest(url), self.assertRaisesRegex(SettingsError, words):
                server.open_sign_in(dataclasses.replace(self.settings, database=url))

    def test_the_next_host_is_taken_when_one_is_not_there(self):
        self.database = f"mysql://root@127.0.0.1:{free_port()},127.0.0.1:{mariadb.port}/{self.name}"
        self.assertTrue(self.add_user())

    def test_tls_checks_the_certificate_and_the_name(self):
        ca = f"{mariadb.folder}/ca.pem"
        self.database = mariadb.url(self.name, ssl_ca=ca).replace("127.0.0.1", "localhost")
        with self.store.transaction() as run:
            self.assertTrue(run("SHOW STATUS LIKE 'Ssl_cipher'").fetchone()[1])
        other = ssl.get_default_verify_paths().cafile or ssl.get_default_verify_paths().openssl_cafile
        for url in [mariadb.url(self.name, ssl_ca=ca), mariadb.url(self.name, ssl_ca=other)]:
            with self.subTest(url), self.assertRaises(SettingsError):
                server.open_sign_in(dataclasses.replace(self.settings, database=url))
        unnamed = mariadb.url(self.name, ssl_ca=ca, ssl_verify_identity="false")
        server.open_sign_in(dataclasses.replace(self.settings, database=unnamed)).close()

    def test_schema_runs_twice_through_the_command_line_client(self):
        client = program("mariadb", "mysql")
        for _ in range(2):
            with open(HERE / "schema.sql", "rb") as script:
                command = [client, "--no-defaults", f"--socket={mariadb.socket}", "-uroot", self.name]
                subprocess.run(command, stdin=script, check=True)
        self.add_user("日本語")
        self.assertEqual(
            self.raw_sql(
                "SELECT table_collation FROM information_schema.tables WHERE table_name = 'user' AND table_schema = %s",
                self.name,
            )[0][0][:7],
            "utf8mb4",
        )


class TutorialTableTest(MySQLCase):
    """The tutorial's own table, in place."""

    def setUp(self):
        super().setUp()
        self.raw_sql(TUTORIAL_TABLE)
        self.raw_sql("INSERT INTO user (username, password) VALUES ('roy', %s)", TUTORIAL_HASH)
        self.settings = dataclasses.replace(self.settings, pbkdf2_iterations=Settings.pbkdf2_iterations)
        self.structure = self.raw_sql("SHOW CREATE TABLE user")

    def tearDown(self):
        without_counter = [
            re.sub(r" AUTO_INCREMENT=\d+", "", text) for _, text in self.raw_sql("SHOW CREATE TABLE user")
        ]
        self.assertEqual(without_counter, [re.sub(r" AUTO_INCREMENT=\d+", "", text) for _, text in self.structure])

    def test_roy_signs_in_and_his_hash_is_upgraded_and_he_signs_in_again(self):
        self.assertTrue(self.login("roy", "roy"))
        [(stored,)] = self.raw_sql("SELECT password FROM user")
        self.assertTrue(stored.startswith("pbkdf2:sha256:600000$"), stored)
        token = self.login("roy", "roy")
        self.assertEqual(self.raw_sql("SELECT password FROM user"), [(stored,)])
        self.assertEqual(self.get("/auth/me", token).json["username"], "roy")

    def test_rows_with_null_or_nothing_in_them_let_nobody_in(self):
        self.settings = dataclasses.replace(self.settings, pbkdf2_iterations=1)
        self.raw_sql("INSERT INTO user (username, password) VALUES (NULL, NULL), ('ann', NULL), ('bob', ''), ('', 'x')")
        for name in ["ann", "bob", ""]:
            for password in ["", "x", "None"]:
                body = {"username": name, "password": password}
                self.assert_refused(self.client.post_json("/auth", body, status=401), 401, "Bad Request")
        self.assertEqual(len(self.store.list_users()), 5)

    def test_two_rows_of_one_name_let_nobody_in_and_the_log_says_so(self):
        self.raw_sql("INSERT INTO user (username, password) VALUES ('roy', %s)", TUTORIAL_HASH)
        with self.assertLogs("auth") as logged:
            answer = self.client.post_json("/auth", {"username": "roy", "password": "roy"}, status=401)
        self.assert_refused(answer, 401, "Bad Request", "Invalid credentials")
        self.assertIn("2 users are named 'roy' (ids 1, 2)", logged.output[0])
        with self.assertRaisesRegex(Conflict, "2 users are named 'roy'"):
            self.store.find_user("roy")

    def test_rows_that_differ_in_case_are_different_users(self):
        self.settings = dataclasses.replace(self.settings, pbkdf2_iterations=1)
        self.add_user("ROY", "other")
        self.assertEqual(self.get("/auth/me", self.login("ROY", "other")).json["username"], "ROY")
        self.client.post_json("/auth", {"username": "ROY", "password": "roy"}, status=401)

    def test_a_name_that_the_table_cannot_hold_is_a_clear_error(self):
        for name in ["日本語", "x" * 46]:
            with (
                self.subTest(name),
                self.assertRaisesRegex(server.BadRequest, "columns are too short, or cannot write"),
            ):
                self.add_user(name)
        self.assert_refused(
            self.client.post_json("/auth", {"username": "日本語", "password": "x"}, status=401), 401, "Bad Request"
        )

    def test_of_many_who_add_one_name_at_once_one_succeeds(self):
        def add(_):
            with contextlib.suppress(server.AuthError):
                return self.add_user("alice")

        self.store.prepare()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(add, range(16)))
        self.assertEqual(self.raw_sql("SELECT COUNT(*) FROM user WHERE username = 'alice'"), [(1,)])


# --- Tokens ---


class TokensTest(unittest.TestCase):
    # The tutorial's example: HS256 with `secret-key`, as PyJWT 1.7 wrote it.
    TUTORIAL_TOKEN = (
        "eyJ0eXAiOiJKV1QiLCJhbGciOiJIUzI1NiJ9."
        "eyJleHAiOjE1NjgyMTAzMjcsImlhdCI6MTU2ODIxMDAyNywibmJmIjoxNTY4MjEwMDI3LCJpZGVudGl0eSI6MX0."
        "nTgsAwHL4oNEVVWMfLLUMFUaoDVHA0zuVMBgRbevggE"
    )

    def setUp(self):
        self.keys = KeySet([server.Key.from_secret(SECRET)])

    def verify(self, now=NOW, leeway=0, headers=None, **changes):
        claims = {"exp": NOW + 300, "iat": NOW, "nbf": NOW, "identity": 1} | changes
        claims = {name: value for name, value in claims.items() if value is not None}
        return self.keys.verify(jwt.encode(claims, SECRET, "HS256", headers), now, leeway)

    def test_the_tutorials_token_verifies_with_its_secret_at_its_time(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", jwt.InsecureKeyLengthWarning)
            keys = KeySet([server.Key.from_secret("secret-key")])
            claims = keys.verify(self.TUTORIAL_TOKEN, now=1568210100)
            self.assertEqual(claims, {"exp": 1568210327, "iat": 1568210027, "nbf": 1568210027, "identity": 1})
            with self.assertRaisesRegex(server.InvalidToken, "Signature has expired"):
                keys.verify(self.TUTORIAL_TOKEN, now=1568210327)
            with self.assertRaisesRegex(server.InvalidToken, "Signature verification failed"):
                self.keys.verify(self.TUTORIAL_TOKEN, now=1568210100)

    def test_what_is_signed_verifies_and_names_its_key(self):
        claims = {"exp": NOW + 300, "iat": NOW, "nbf": NOW, "identity": 7, "sub": "7"}
        token = self.keys.sign(claims)
        self.assertEqual(self.keys.verify(token, NOW), claims)
        header = json.loads(base64.urlsafe_b64decode(token.partition(".")[0] + "=="))
        self.assertEqual(header, {"typ": "JWT", "alg": "HS256", "kid": self.keys.keys[0].kid})

    def test_the_kid_is_the_thumbprint_of_rfc_7638(self):
        rsa = {  # the example of its section 3.1
            "e": "AQAB",
            "kty": "RSA",
            "n": "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3"
            "oknjhMstn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6"
            "qMQvRL5hajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJ"
            "zKnqDKgw",
        }
        self.assertEqual(server.thumbprint(rsa), "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs")

    def test_times_are_compared_with_now_and_leeway(self):
        self.assertTrue(self.verify(NOW + 299))
        self.assertTrue(self.verify(NOW + 309, leeway=10))
        self.assertTrue(self.verify(NOW - 10, leeway=10))
        self.assertTrue(self.verify(iat=NOW - 0.5, nbf=NOW - 0.5, exp=NOW + 0.5))
        for words, now, changes in [
            ("Signature has expired", NOW + 300, {}),
            ("Signature has expired", NOW, {"exp": NOW}),
            (r"not yet valid \(iat\)", NOW - 1, {"nbf": NOW - 5}),
            (r"not yet valid \(nbf\)", NOW - 1, {"iat": NOW - 5}),
        ]:
            with self.subTest(words, changes=changes), self.assertRaisesRegex(server.InvalidToken, words):
                self.verify(now, **changes)

    def test_claims_that_are_missing_or_of_another_type_are_refused(self):
        for name in ("exp", "iat", "nbf"):
            for value in [None, str(NOW), [NOW], {}, True, -1, 2**70, float("nan"), float("inf"), ""]:
                with self.subTest(name, value=value), self.assertRaises(server.InvalidToken):
                    self.verify(**{name: value})
        for value in [None, "1", 1.0, True, False, 0, -1, [1], {"id": 1}, 2**63, 2**70]:
            with self.subTest(identity=value), self.assertRaises(server.InvalidToken):
                self.verify(identity=value)
        for value in ["2", 1, "01", ""]:
            with self.subTest(sub=value), self.assertRaises(server.InvalidToken):
                self.verify(sub=value)
        with self.assertRaises(server.InvalidToken):
            self.verify(aud="another service")

    def test_a_kid_chooses_nothing_but_our_key(self):
        self.assertTrue(self.verify(headers={"kid": self.keys.keys[0].kid}))
        for kid in ["other", "../../dev/null", "' OR 1=1 --", ""]:
            with self.subTest(kid), self.assertRaisesRegex(server.InvalidToken, "Signature verification failed"):
                self.verify(headers={"kid": kid})

    def test_no_secret_in_the_repr(self):
        for algorithm in server.ALGORITHMS:
            jwk = server.new_jwk(algorithm)
            self.assertNotIn(jwk.get("d") or jwk["k"], repr(server.Key.from_jwk(jwk)))
        self.assertNotIn(SECRET, repr(self.keys.keys))


class KeyFileTest(Case):
    def setUp(self):
        super().setUp()
        self.path = self.folder / "auth.keys"
        self.settings = Settings(keys=str(self.path))

    def test_it_is_made_once_and_never_overwritten(self):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            kids = {keys.keys[0].kid for keys in pool.map(lambda _: KeySet.load(self.settings, create=True), range(16))}
        self.assertEqual(len(kids), 1)
        self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), 0o600)
        self.assertEqual([path.name for path in self.folder.iterdir()], ["auth.keys"])
        [jwk] = json.loads(self.path.read_text())["keys"]
        self.assertEqual(jwk["kid"], kids.pop())
        self.assertEqual(len(base64.urlsafe_b64decode(jwk["k"] + "=")), 32)

    def test_a_draft_that_a_kill_has_left_behind_is_in_nobodys_way(self):
        draft = self.folder / "auth.keys.draft"
        draft.write_text("half a key")
        KeySet.load(self.settings, create=True)
        draft.write_text("half a key")
        server.rotate_key_file(self.path)
        self.assertEqual([path.name for path in self.folder.iterdir()], ["auth.keys"])

    def test_without_create_a_missing_file_is_an_error(self):
        with self.assertRaisesRegex(SettingsError, "No such file"):
            KeySet.load(self.settings)
        with self.assertRaisesRegex(SettingsError, "No such file"):
            JWTPlugin(keys=str(self.path))

    def test_a_file_open_to_others_is_refused(self):
        KeySet.load(self.settings, create=True)
        for mode, good in [(0o600, True), (0o400, True), (0o640, True), (0o644, False), (0o604, False), (0o620, False)]:
            self.path.chmod(mode)
            with self.subTest(oct(mode)):
                if good:
                    KeySet.load(self.settings)
                else:
                    with self.assertRaisesRegex(SettingsError, f"chmod 600 {self.path}"):
                        KeySet.load(self.settings, create=True)

    def test_a_malformed_file_is_an_error_that_repeats_nothing_and_stays_as_it_was(self):
        secret = "c2VjcmV0IG9mIHRoZSB0ZXN0cywgbG9uZ2VyIHRoYW4gMzIgYnl0ZXM"
        for content in [
            *(
                "",
                secret,
                "[]",
                "{}",
                '{"keys": {}}',
                '{"keys": []}',
                '{"keys": "%s"}' % secret,
                '{"keys": ["%s"]}' % secret,
            ),
            '{"keys": [{"kty": "oct", "alg": "HS256", "k": "%s"' % secret,
            '{"keys": [{"kty": "oct", "alg": "none", "k": "%s"}]}' % secret,
            '{"keys": [{"kty": "oct", "alg": "HS256", "k": "c2hvcnQ"}]}',
            '{"keys": [{"kty": "oct", "alg": "HS256", "k": 5}]}',
            '{"keys": [{"kty": "oct", "alg": "HS256", "k": "%s"}]}' % server.base64url(b"x" * 32),
            '{"keys": [{"kty": "oct", "k": "%s"}]}' % server.base64url(b"a-string-secret-at-least-256-bits-long"),
            '{"keys": [{"kty": "oct", "alg": "HS256"}]}',
            '{"keys": [{"kty": "XYZ", "k": "%s"}]}' % secret,
            "[" * 100_000,
            "\udcff",
        ]:
            self.path.write_text(content, encoding="utf-8", errors="surrogateescape")
            self.path.chmod(0o600)
            with self.subTest(content[:60]), self.assertRaisesRegex(SettingsError, "key file") as caught:
                KeySet.load(self.settings, create=True)
            self.assertNotIn(secret, str(caught.exception))
            self.assertEqual(self.path.read_text(encoding="utf-8", errors="surrogateescape"), content)

    def test_a_folder_that_is_not_there(self):
        with self.assertRaisesRegex(SettingsError, "cannot be written: No such file"):
            KeySet.load(Settings(keys=str(self.folder / "no" / "auth.keys")), create=True)


class RotationTest(Case):
    """The key file changes under a key set that is in use."""

    def setUp(self):
        super().setUp()
        self.path = self.folder / "auth.keys"
        self.settings = Settings(keys=str(self.path))
        self.keys = KeySet.load(self.settings, create=True)
        self.claims = {"exp": NOW + 900, "iat": NOW, "nbf": NOW, "identity": 1}
        self.session = server.Session("A" * 22, 1, "", "", NOW, NOW, NOW + 900, 1, NOW, self.keys.keys[0].kid)

    def rotate(self, algorithm=None):
        return server.rotate_key_file(self.path, algorithm)

    def test_the_newest_key_signs_and_all_verify(self):
        tokens, refresh = [self.keys.sign(self.claims)], self.keys.refresh_token(self.session)
        for number, algorithm in enumerate(["EdDSA", "ES256", "RS256", "HS256", None], 1):
            key = self.rotate(algorithm)
            self.assertEqual(key.algorithm, algorithm or "HS256")
            tokens.append(self.keys.sign(self.claims | {"iat": NOW + number}))
            header = jwt.get_unverified_header(tokens[-1])
            self.assertEqual(header, {"typ": "JWT", "alg": key.algorithm, "kid": key.kid})
            for token in tokens:
                self.assertEqual(self.keys.verify(token, NOW + number)["identity"], 1)
            self.assertEqual(self.keys.refresh_token(self.session), refresh)
            self.assertEqual(self.keys.read_refresh_token(refresh, NOW + number), ("A" * 22, 1))

    def test_a_stock_client_verifies_from_the_jwks_alone(self):
        options = {"verify_exp": False, "verify_nbf": False, "verify_iat": False}
        tokens = []
        for algorithm in server.ALGORITHMS[1:]:
            self.rotate(algorithm)
            tokens.append(KeySet.load(self.settings).sign(self.claims))
        published = json.loads(json.dumps(KeySet.load(self.settings).public(NOW)))
        self.assertEqual([jwk["alg"] for jwk in published["keys"]], ["RS256", "ES256", "EdDSA"])
        private = {"d", "k", "p", "q", "dp", "dq", "qi", "oth"}
        self.assertFalse([jwk for jwk in published["keys"] if private & set(jwk)])
        for token, algorithm in zip(tokens, server.ALGORITHMS[1:], strict=True):
            key = jwt.PyJWKSet.from_dict(published)[jwt.get_unverified_header(token)["kid"]]
            self.assertEqual(jwt.decode(token, key, algorithms=[algorithm], options=options), self.claims)

    def test_a_changed_file_is_taken_up_within_a_second_and_for_an_unknown_key_at_once(self):
        self.keys.verify(self.keys.sign(self.claims), NOW)
        self.rotate()
        other = KeySet.load(self.settings)
        self.assertEqual(len(self.keys.keys), 1)
        self.assertTrue(self.keys.verify(other.sign(self.claims), NOW))
        self.assertEqual(len(self.keys.keys), 2)
        self.rotate()
        session = dataclasses.replace(self.session, kid=KeySet.load(self.settings).keys[0].kid)
        self.assertTrue(self.keys.read_refresh_token(KeySet.load(self.settings).refresh_token(session), NOW))
        self.rotate()
        self.keys.sign(self.claims | {"iat": NOW + 1})
        self.assertEqual(len(self.keys.keys), 4)

    def test_a_broken_file_leaves_the_keys_as_they_are_and_the_log_says_why_once(self):
        token = self.keys.sign(self.claims)
        good = self.path.read_text()
        jwk = json.loads(good)["keys"][0]
        unknown = {"kty": "EC", "crv": "P-521", "alg": "ES512", "x": "x", "y": "y", "d": "d"}
        for number, content in enumerate(
            ["", good[: len(good) // 2], json.dumps({"keys": [jwk, jwk]}), json.dumps({"keys": [jwk, unknown]}), None],
            1,
        ):
            if content is None:
                self.path.unlink()
            else:
                self.path.write_text(content)
            with self.subTest(content), self.assertLogs("auth", "ERROR") as logged:
                self.assertTrue(self.keys.verify(token, NOW + number))
                self.assertTrue(self.keys.verify(token, NOW + number + 0.99))
            self.assertEqual(len(logged.output), 1)
            self.assertNotIn(jwk["k"], logged.output[0])
            with self.assertNoLogsOfErrors():
                self.keys.verify(token, NOW + number + 0.999)

    @contextlib.contextmanager
    def assertNoLogsOfErrors(self):
        with self.assertLogs("auth") as logged:
            logging.getLogger("auth").info("one line, for assertLogs wants one")
            yield
        self.assertEqual(len(logged.output), 1)

    def test_a_token_that_verified_is_remembered_and_never_outlives_its_times_or_its_key(self):
        token, old = self.keys.sign(self.claims), self.keys.keys[0].kid
        with mock.patch.object(self.keys, "_decode", wraps=self.keys._decode) as decode:
            for _ in range(5):
                self.keys.verify(token, NOW + 1)
            self.assertEqual(decode.call_count, 1)
            for now, leeway, words in [
                (NOW + 900, 0, "expired"),
                (NOW + 905, 4, "expired"),
                (NOW - 1, 0, "not yet valid"),
            ]:
                with self.assertRaisesRegex(server.InvalidToken, words):
                    self.keys.verify(token, now, leeway)
            self.assertTrue(self.keys.verify(token, NOW + 905, leeway=6))
            self.assertEqual(decode.call_count, 1)
            self.rotate()
            server.retire_key(self.path, old)
            with self.assertRaisesRegex(server.InvalidToken, "Signature verification failed"):
                self.keys.verify(token, NOW + 2)

    def test_the_memory_of_tokens_is_bounded_under_a_million(self):
        with mock.patch.object(self.keys, "_decode", lambda token: self.claims):
            for number in range(1_000_000):
                self.keys.verify(str(number), NOW + 1)
                if number % 1000 == 0:
                    self.assertLessEqual(len(self.keys._verified), server.REMEMBERED)

    def test_a_key_that_is_added_verifies_and_signs_once_it_is_promoted(self):
        before = self.keys.keys[0].kid
        added = server.rotate_key_file(self.path, "EdDSA", signs=False)
        token = self.keys.sign(self.claims | {"iat": NOW + 2})
        self.assertEqual(jwt.get_unverified_header(token)["kid"], before)
        self.assertEqual([key.kid for key in self.keys.keys], [before, added.kid])
        self.assertEqual(server.promote_key(self.path, added.kid).kid, added.kid)
        token = self.keys.sign(self.claims | {"iat": NOW + 4})
        self.assertEqual(jwt.get_unverified_header(token)["kid"], added.kid)
        with self.assertRaisesRegex(SettingsError, "there is no key 'x'"):
            server.promote_key(self.path, "x")

    def test_two_hosts_change_keys_and_refuse_nothing(self):
        """As the README tells: add here, copy there, then promote on each; in between each verifies the other's."""
        other = self.path.with_name("other.keys")
        shutil.copy(self.path, other)
        here, there = self.keys, KeySet.load(dataclasses.replace(self.settings, keys=str(other)))
        added = server.rotate_key_file(self.path, signs=False).kid
        now = NOW
        for step in [
            lambda: None,
            lambda: shutil.copy(self.path, other),
            lambda: server.promote_key(self.path, added),
            lambda: server.promote_key(other, added),
        ]:
            step()
            now += 2
            for one, another in [(here, there), (there, here)]:
                self.assertTrue(another.verify(one.sign(self.claims | {"iat": now, "exp": now + 300}), now))
        self.assertEqual({keys.signing_kid(now) for keys in (here, there)}, {added})

    def test_a_file_that_could_not_be_read_is_tried_again(self):
        self.rotate()
        self.path.chmod(0o644)
        with self.assertLogs("auth", "ERROR"):
            self.keys.sign(self.claims | {"iat": NOW + 1})
        self.assertEqual(len(self.keys.keys), 1)
        self.path.chmod(0o600)
        self.keys.sign(self.claims | {"iat": NOW + 2})
        self.assertEqual(len(self.keys.keys), 2)

    def test_a_slow_reader_of_an_older_file_has_not_the_last_word(self):
        old, read = self.keys.keys[0].kid, server.read_key_file
        paused, go_on = threading.Event(), threading.Event()

        def read_slowly(path):
            keys = read(path)
            paused.set()
            go_on.wait(30)
            return keys

        self.rotate()
        with mock.patch("server.read_key_file", read_slowly):
            slow = threading.Thread(target=self.keys._read_if_changed)
            slow.start()
            paused.wait(30)
        server.retire_key(self.path, old)
        quick = threading.Thread(target=self.keys._read_if_changed)
        quick.start()
        go_on.set()
        slow.join(30), quick.join(30)
        self.assertNotIn(old, [key.kid for key in self.keys.keys])

    def test_a_fifo_in_place_of_the_file_is_refused(self):
        self.path.unlink()
        os.mkfifo(self.path, 0o600)
        with self.assertRaisesRegex(SettingsError, "not a JWK Set"):
            KeySet.load(self.settings)

    def test_a_retired_key_verifies_nothing_any_more(self):
        token, refresh = self.keys.sign(self.claims), self.keys.refresh_token(self.session)
        with self.assertRaisesRegex(SettingsError, "is the last key; rotate first"):
            server.retire_key(self.path, self.keys.keys[0].kid)
        with self.assertRaisesRegex(SettingsError, "no key 'nix'"):
            server.retire_key(self.path, "nix")
        self.rotate()
        server.retire_key(self.path, self.keys.keys[0].kid)
        with self.assertRaises(server.InvalidToken):
            self.keys.verify(token, NOW + 1)
        with self.assertRaises(server.InvalidToken):
            self.keys.read_refresh_token(refresh, NOW + 1)

    def test_a_rotation_keeps_owner_mode_and_link_and_leaves_no_draft(self):
        self.path.chmod(0o640)
        owner = (1234, 1001) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
        os.chown(self.path, *owner)
        link = self.folder / "link.keys"
        link.symlink_to(self.path)
        server.rotate_key_file(link)
        self.assertEqual(stat.S_IMODE(self.path.stat().st_mode), 0o640)
        self.assertTrue(link.is_symlink())
        self.assertEqual((self.path.stat().st_uid, self.path.stat().st_gid), owner)
        self.assertEqual(sorted(path.name for path in self.folder.iterdir()), ["auth.keys", "link.keys"])

    def test_of_many_rotations_at_once_none_is_lost(self):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            kids = {key.kid for key in pool.map(lambda _: self.rotate(), range(16))}
        self.assertLess(kids, {key.kid for key in KeySet.load(self.settings).keys})
        self.assertEqual(len(kids), 16)

    def test_a_secret_verifies_beside_the_file_whose_first_key_signs(self):
        before = KeySet.load(Settings(secret_key=SECRET, keys=str(self.folder / "none.keys")), create=True)
        self.assertFalse((self.folder / "none.keys").exists())
        keys = KeySet.load(dataclasses.replace(self.settings, secret_key=SECRET))
        self.assertEqual([key.kid for key in keys.keys], [self.keys.keys[0].kid, before.keys[0].kid])
        self.assertTrue(keys.verify(before.sign(self.claims), NOW))
        self.assertTrue(self.keys.verify(keys.sign(self.claims), NOW))
        server.rotate_key_file(self.folder / "none.keys")  # the way from the one to the other, while it runs
        self.assertNotEqual(
            jwt.get_unverified_header(before.sign(self.claims | {"iat": NOW + 1}))["kid"], keys.keys[1].kid
        )

    def test_keys_that_are_too_weak_are_refused(self):
        from cryptography.hazmat.primitives.asymmetric import rsa

        short = jwt.get_algorithm_by_name("RS256").to_jwk(rsa.generate_private_key(65537, 2048), as_dict=True)
        public = server.Key.from_jwk(server.new_jwk("EdDSA")).public
        for jwk, words in [(short, "2048 bits; it needs 3072"), (public, "not a private")]:
            self.path.write_text(json.dumps({"keys": [jwk]}))
            with self.subTest(words), self.assertRaisesRegex(SettingsError, words):
                KeySet.load(self.settings)

    def test_the_public_key_is_no_secret_for_hs256(self):
        key = self.rotate("RS256")
        self.keys._read_if_changed()
        from cryptography.hazmat.primitives import serialization

        public = key.signer.key.public_key()
        encodings = [
            public.public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo)
            for encoding in (serialization.Encoding.PEM, serialization.Encoding.DER)
        ]
        for secret in [*encodings, json.dumps(key.public).encode(), key.public["n"].encode()]:
            for header in [{"alg": "HS256", "kid": key.kid}, {"alg": "HS256"}]:
                parts = ".".join(server.base64url(json.dumps(part).encode()) for part in (header, self.claims))
                forged = f"{parts}.{server.base64url(hmac.digest(secret, parts.encode(), 'sha256'))}"
                with self.subTest(header=header), self.assertRaises(server.InvalidToken):
                    self.keys.verify(forged, NOW)

    def test_a_kid_of_another_algorithm_is_refused(self):
        hs256, eddsa = self.keys.keys[0], self.rotate("EdDSA")
        self.keys._read_if_changed()
        for key, kid in [(hs256, eddsa.kid), (eddsa, hs256.kid)]:
            forged = jwt.encode(self.claims, key.signer, headers={"kid": kid})
            with self.subTest(kid), self.assertRaises(server.InvalidToken):
                self.keys.verify(forged, NOW)


# --- Sign-in ---


@on_each_engine
class SignInTest:
    def test_a_good_login_gives_a_token_that_stands_for_the_user(self):
        user_id = self.add_user()
        tokens = self.sign_in.login("alice", "correct horse", NOW)
        self.assertEqual((tokens["token_type"], tokens["expires_in"]), ("Bearer", 300))
        identity, claims = self.sign_in.authenticate(tokens["access_token"], NOW + 299)
        self.assertEqual((identity.id, identity.username), (user_id, "alice"))
        times = {"exp": NOW + 300, "iat": NOW, "nbf": NOW, "identity": user_id, "sub": str(user_id)}
        self.assertEqual(claims, times | {"jti": claims["jti"], "sid": identity.session.id})
        with self.assertRaisesRegex(server.InvalidToken, "Signature has expired"):
            self.sign_in.authenticate(tokens["access_token"], NOW + 300 + self.settings.leeway)

    def test_each_token_has_an_id_of_its_own(self):
        self.add_user()
        tokens = [self.sign_in.login("alice", "correct horse", NOW)["access_token"] for _ in range(2)]
        self.assertEqual(len({self.sign_in.authenticate(token, NOW)[1]["jti"] for token in tokens}), 2)

    def test_an_old_hash_is_upgraded_at_a_good_login_only(self):
        self.settings = dataclasses.replace(self.settings, pbkdf2_iterations=2)
        for old in [server.hash_password("correct horse", 1), PasswordsTest.VECTORS[3][0], PasswordsTest.VECTORS[4][0]]:
            self.store.add_user(old[-40:], old)
            with self.assertRaises(server.InvalidCredentials):
                self.sign_in.login(old[-40:], "wrong", NOW)
            self.assertEqual(self.store.find_user(old[-40:]).password_hash, old)
            self.sign_in.login(old[-40:], "correct horse", NOW)
            new = self.store.find_user(old[-40:]).password_hash
            self.assertTrue(new.startswith("pbkdf2:sha256:2$"))
            self.sign_in.login(old[-40:], "correct horse", NOW)
            self.assertEqual(self.store.find_user(old[-40:]).password_hash, new)

    def test_a_failed_upgrade_does_not_fail_the_login(self):
        self.settings = dataclasses.replace(self.settings, pbkdf2_iterations=2)
        self.add_user()
        if self.database.startswith("sqlite"):
            self.raw_sql("CREATE TRIGGER no BEFORE UPDATE ON user BEGIN SELECT RAISE(FAIL, 'read-only'); END")
        else:
            self.raw_sql("CREATE TRIGGER no BEFORE UPDATE ON user FOR EACH ROW SIGNAL SQLSTATE '45000'")
        with self.assertLogs("auth", "WARNING") as logged:
            self.assertIn("access_token", self.sign_in.login("alice", "correct horse", NOW))
        self.assertIn('"upgrade_failed"', "".join(logged.output))
        self.assertNotIn("pbkdf2", "".join(logged.output))

    def test_a_token_without_a_session_must_be_short_lived(self):
        self.add_user()
        self.assertTrue(self.sign_in.authenticate(self.token(), time.time()))
        long = self.token(exp=int(time.time()) + 301)
        with self.assertRaisesRegex(server.InvalidToken, "is taken only with its session"):
            self.sign_in.authenticate(long, time.time())

    def test_new_names_and_passwords_are_checked(self):
        for name in ["", " alice", "alice\t", "al\0ice", "al\nice", "\u00a0a", "x" * 256, "\ud800", None, 5]:
            with self.subTest(name), self.assertRaises(server.BadRequest):
                self.sign_in.add_user(name, "correct horse")
        for password in ["", None, 5, "\udcff"]:
            with self.subTest(password=password), self.assertRaises(server.BadRequest):
                self.sign_in.add_user("alice", password)
        self.assertEqual(self.store.list_users(), [])
        self.sign_in.add_user("alice", "correct horse")
        self.assertTrue(self.sign_in.login("alice", "correct horse", NOW))


@on_each_engine
class SessionTest:
    """Refresh, sign-out, API tokens: by `now`, not by waiting."""

    def open_session(self, now=NOW, **client):
        return self.sign_in.login("alice", "correct horse", now, **client)

    def identity(self, tokens, now=NOW):
        return self.sign_in.authenticate(tokens["access_token"], now)[0]

    def assert_ended(self, tokens, now=NOW):
        with self.assertRaises(server.SessionEnded):
            self.sign_in.authenticate(tokens["access_token"], now)

    def rows(self):
        return self.raw_sql(f"SELECT {server.SESSION} FROM auth_session ORDER BY created")

    def test_a_refresh_gives_a_new_pair_and_keeps_the_session(self):
        self.add_user()
        first = self.open_session(name="curl/8", address="192.0.2.1")
        second = self.sign_in.refresh(first["refresh_token"], NOW + 100)
        self.assertEqual(list(second), ["access_token", "token_type", "expires_in", "refresh_token"])
        self.assertNotEqual(second["refresh_token"], first["refresh_token"])
        session = self.identity(second, NOW + 100).session
        self.assertEqual(session.id, self.identity(first).session.id)
        self.assertEqual((session.name, session.address, session.created), ("curl/8", "192.0.2.1", NOW))
        self.assertEqual((session.last_used, session.generation), (NOW + 100, 2))

    def test_the_previous_token_sent_again_in_time_gets_the_current_one(self):
        self.add_user()
        first = self.open_session()
        second = self.sign_in.refresh(first["refresh_token"], NOW + 100.9)
        again = self.sign_in.refresh(first["refresh_token"], NOW + 110.8)
        self.assertEqual(again["refresh_token"], second["refresh_token"])
        self.assertNotEqual(again["access_token"], second["access_token"])
        self.assertTrue(self.identity(again, NOW + 111))
        self.assertEqual(len(self.rows()), 1)
        self.assertTrue(self.sign_in.refresh(second["refresh_token"], NOW + 200))

    def test_the_previous_token_after_that_is_theft_and_ends_the_session(self):
        self.add_user()
        first = self.open_session()
        second = self.sign_in.refresh(first["refresh_token"], NOW + 100)
        with self.assertLogs("auth", "WARNING") as logged, self.assertRaises(server.SessionEnded):
            self.sign_in.refresh(first["refresh_token"], NOW + 111)
        self.assertIn('"reuse_detected"', logged.output[0])
        self.assertNotIn(first["refresh_token"], logged.output[0])
        self.assert_ended(second, NOW + 111)
        with self.assertRaises(server.SessionEnded):
            self.sign_in.refresh(second["refresh_token"], NOW + 111)

    def test_an_older_token_is_theft_at_once(self):
        self.add_user()
        first = self.open_session()
        second = self.sign_in.refresh(first["refresh_token"], NOW + 1)
        third = self.sign_in.refresh(second["refresh_token"], NOW + 2)
        with self.assertLogs("auth", "WARNING"), self.assertRaises(server.SessionEnded):
            self.sign_in.refresh(first["refresh_token"], NOW + 3)
        self.assert_ended(third, NOW + 3)

    def test_of_fifty_at_once_all_get_one_new_generation(self):
        self.add_user()
        first = self.open_session()
        start = threading.Barrier(50)

        def refresh(_):
            start.wait()
            return self.sign_in.refresh(first["refresh_token"], NOW + 1)

        with concurrent.futures.ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(refresh, range(50)))
        self.assertEqual(len({tokens["refresh_token"] for tokens in answers}), 1)
        self.assertEqual(len({tokens["access_token"] for tokens in answers}), 50)
        [session] = self.rows()
        self.assertEqual(server.Session(*session).generation, 2)
        with self.assertLogs("auth", "WARNING"), self.assertRaises(server.SessionEnded):
            self.sign_in.refresh(first["refresh_token"], NOW + 12)
        self.assertEqual(self.rows(), [])

    def test_a_session_lives_from_refresh_to_refresh_and_never_longer_than_its_maximum(self):
        self.settings = dataclasses.replace(self.settings, session_ttl=1000, session_max=2500, token_ttl=300)
        self.add_user()
        tokens = self.open_session()
        for now, expires in [(NOW + 900, 1900), (NOW + 1800, 2500), (NOW + 2400, 2500)]:
            tokens = self.sign_in.refresh(tokens["refresh_token"], now)
            self.assertEqual(self.identity(tokens, now).session.expires, NOW + expires)
        self.assertEqual(tokens["expires_in"], 100)
        self.assert_ended(tokens, NOW + 2500)
        with self.assertRaises(server.SessionEnded):
            self.sign_in.refresh(tokens["refresh_token"], NOW + 2500)

    def test_a_maximum_that_was_lowered_ends_a_session_at_its_refresh(self):
        self.add_user()
        tokens = self.open_session()
        self.sign_in.settings = dataclasses.replace(self.settings, session_max=3600)
        with self.assertRaises(server.SessionEnded):
            self.sign_in.refresh(tokens["refresh_token"], NOW + 7200)

    def test_a_session_that_is_not_refreshed_ends(self):
        self.settings = dataclasses.replace(self.settings, session_ttl=100)
        self.add_user()
        tokens = self.open_session()
        with self.assertRaises(server.SessionEnded):
            self.sign_in.refresh(tokens["refresh_token"], NOW + 100)

    def test_what_is_no_refresh_token_is_refused_and_changes_nothing(self):
        self.add_user()
        tokens = self.open_session()
        token = tokens["refresh_token"]
        sid, _, mac = token.split(".")
        other = KeySet([server.Key.from_secret("another secret of the tests, of more than 32 bytes")])
        session = self.identity(tokens).session
        api_token = self.sign_in.make_api_token(self.identity(tokens), "backup", 1000, NOW)
        before = self.rows()
        for bad in [
            *("", ".", "..", "x", sid, mac, token[:-1], token[1:], token + "x", token + "\n", token.upper(), token * 2),
            *(
                f"{sid}.2.{mac}",
                f"{sid}.0.{mac}",
                f"{sid}.01.{mac}",
                f"{sid}.-1.{mac}",
                f"{sid}.١.{mac}",
                f"{sid}.{mac}",
            ),
            *("\ud800", "\0", "é" * 100, "x" * 50_000, sid + ".1." + "A" * 43, "A" * 22 + ".1." + mac),
            other.refresh_token(session),  # of another database, whose keys are others
            tokens["access_token"],
            api_token["access_token"],
        ]:
            with self.subTest(bad[:60]), self.assertRaises(server.InvalidToken):
                self.sign_in.refresh(bad, NOW)
        self.assertEqual(self.rows(), before)
        for generation in [0, 5]:  # of an API token, and of a database that is newer than this one
            future = self.sign_in.keys.refresh_token(dataclasses.replace(session, generation=generation))
            with self.subTest(generation), self.assertRaises(server.InvalidToken):
                self.sign_in.refresh(future, NOW)
        self.assertTrue(self.sign_in.refresh(token, NOW))

    def test_a_token_names_a_session_of_its_own_user(self):
        self.add_user()
        self.add_user("bob")
        tokens = self.open_session()
        sid = self.identity(tokens).session.id
        self.assertTrue(self.sign_in.authenticate(self.token(sid=sid), time.time())[0].session)
        for changes in [{"identity": 2}, {"sid": "A" * 22}]:
            with self.subTest(changes), self.assertRaises(server.SessionEnded):
                self.sign_in.authenticate(self.token(**{"sid": sid} | changes), time.time())
        for bad in ["", "x", 5, [sid], {}, True, sid + "\n", "' OR ''='"]:
            with self.subTest(bad), self.assertRaisesRegex(server.InvalidToken, "claim sid"):
                self.sign_in.authenticate(self.token(sid=bad), time.time())

    def test_sign_out_of_this_session_the_others_or_all(self):
        self.add_user()
        self.store.add_user("bob", server.hash_password("correct horse", 1))
        for scope, alive in [("local", "bc"), ("others", "a"), ("global", "")]:
            sessions = {name: self.open_session() for name in "abc"}
            bob = self.sign_in.login("bob", "correct horse", NOW)
            self.sign_in.logout(self.identity(sessions["a"]), scope)
            for name, tokens in sessions.items():
                with self.subTest(scope=scope, session=name):
                    if name in alive:
                        self.assertTrue(self.identity(tokens))
                    else:
                        self.assert_ended(tokens)
                        with self.assertRaises(server.SessionEnded):
                            self.sign_in.refresh(tokens["refresh_token"], NOW)
            self.assertTrue(self.identity(bob))
            self.store.end_sessions(1)

    def test_a_new_password_needs_the_current_one_and_ends_the_other_sessions(self):
        self.add_user()
        mine, other = self.open_session(), self.open_session()
        for current in ["wrong", "", None, 5, "\ud800"]:
            self.store.forget_failures(self.sign_in.keys.digest("alice", NOW))
            with self.subTest(current), self.assertRaisesRegex(server.BadRequest, "current_password"):
                self.sign_in.change_password(self.identity(mine), current, "battery staple", NOW)
        for _ in range(4):
            with self.assertRaises(server.BadRequest):
                self.sign_in.change_password(self.identity(mine), "wrong", "battery staple", NOW)
        with self.assertRaises(server.TooManyRequests):
            self.sign_in.change_password(self.identity(mine), "correct horse", "battery staple", NOW)
        self.store.forget_failures(self.sign_in.keys.digest("alice", NOW))
        for new in ["", None, 5]:
            with self.subTest(new), self.assertRaises(server.BadRequest):
                self.sign_in.change_password(self.identity(mine), "correct horse", new, NOW)
        self.assertTrue(self.identity(other))
        self.sign_in.change_password(self.identity(mine), "correct horse", "battery staple", NOW)
        self.assertTrue(self.identity(mine))
        self.assertTrue(self.sign_in.refresh(mine["refresh_token"], NOW))
        self.assert_ended(other)
        with self.assertRaises(server.InvalidCredentials):
            self.open_session()
        self.assertTrue(self.sign_in.login("alice", "battery staple", NOW))

    def test_a_sign_in_that_meets_a_lock_or_a_new_password_opens_no_session(self):
        self.add_user()
        user = self.store.find_user("alice")
        session = self.sign_in._new_session(user.id, "", "", NOW)
        self.sign_in.lock(user)  # after the password was found good, before the session is stored
        self.assertFalse(self.store.add_session(session, user.password_hash))
        self.sign_in.unlock(self.store.find_user("alice"))
        self.assertTrue(self.store.add_session(session, user.password_hash))
        self.store.remove_user(user.id)
        self.assertFalse(self.store.add_session(session, user.password_hash))

    def test_a_sign_out_and_a_sign_in_at_the_same_moment(self):
        """Another transaction has ended the sessions, or changed the password, and not committed yet."""
        self.add_user()
        user = self.store.find_user("alice")
        session = self.sign_in._new_session(user.id, "", "", NOW)
        maker = self.identity(self.open_session()).session
        added = []
        for change, add in [
            (
                "UPDATE user SET password = 'new' WHERE id = ?",
                lambda: self.store.add_session(session, user.password_hash),
            ),
            ("DELETE FROM auth_session WHERE user_id = ?", lambda: self.store.add_api_token(session, maker)),
        ]:
            with self.store.transaction() as run:
                run(change, user.id)
                adding = threading.Thread(target=lambda add=add: added.append(add()))
                adding.start()
                adding.join(0.2)
            adding.join(30)
        self.assertEqual(added, [False, False])
        self.assertEqual(self.rows(), [])

    def test_many_sign_ins_at_once_that_all_upgrade_the_hash(self):
        self.settings = dataclasses.replace(self.settings, pbkdf2_iterations=2)
        self.add_user()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            tokens = list(pool.map(lambda _: self.open_session(), range(16)))
        self.assertTrue(all(map(self.identity, tokens)))

    def test_a_locked_user_is_out_until_unlocked(self):
        self.add_user()
        tokens = self.open_session()
        self.sign_in.lock(self.store.find_user("alice"))
        self.assert_ended(tokens)
        with self.assertRaises(server.SessionEnded):  # a token without a session, such as Flask-JWT's
            self.sign_in.authenticate(self.token(), time.time())
        with self.assertRaises(server.InvalidCredentials):
            self.open_session()
        locked = self.store.find_user("alice")
        with self.assertRaisesRegex(Conflict, "locked already"):
            self.sign_in.lock(locked)
        self.sign_in.set_password(locked, "battery staple")
        with self.assertRaises(server.InvalidCredentials):
            self.sign_in.login("alice", "battery staple", NOW)
        self.sign_in.unlock(self.store.find_user("alice"))
        self.assertTrue(self.sign_in.login("alice", "battery staple", NOW))

    def test_an_api_token_is_a_session_without_refresh(self):
        self.add_user()
        identity = self.identity(self.open_session())
        made = self.sign_in.make_api_token(identity, "backup", 366 * 86400, NOW, "192.0.2.1")
        self.assertEqual(list(made), ["access_token", "token_type", "expires_in", "id", "name"])
        later = NOW + 366 * 86400 - 1
        self.assertEqual(self.identity(made, later).username, "alice")
        self.assertTrue(self.identity(made, later).session.is_api_token)
        self.assert_ended(made, later + 1)
        for forbidden in [
            lambda caller: self.sign_in.make_api_token(caller, "more", 1000, NOW),
            lambda caller: self.sign_in.change_password(caller, "correct horse", "battery staple", NOW),
            lambda caller: self.sign_in.logout(caller, "others"),
            lambda caller: self.sign_in.logout(caller, "global"),
            lambda caller: self.sign_in.end_session(caller, identity.session.id),
        ]:
            with self.assertRaises(server.Forbidden):
                forbidden(self.identity(made))
        with self.assertRaises(server.Forbidden):
            self.sign_in.make_api_token(server.Identity(1, "alice"), "more", 1000, NOW)
        self.sign_in.end_session(identity, made["id"])
        self.assert_ended(made)

    def test_an_ended_session_makes_no_api_token(self):
        self.add_user()
        identity = self.identity(self.open_session())
        self.store.end_sessions(1)
        with self.assertRaises(server.SessionEnded):
            self.sign_in.make_api_token(identity, "late", 1000, NOW)
        self.assertEqual(self.rows(), [])

    def test_the_last_use_is_noted_once_a_minute(self):
        self.add_user()
        tokens = self.open_session()
        for now, noted in [(NOW + 59, NOW), (NOW + 60, NOW + 60), (NOW + 100, NOW + 60), (NOW + 120, NOW + 120)]:
            self.sign_in.authenticate(tokens["access_token"], now)
            self.assertEqual(server.Session(*self.rows()[0]).last_used, noted)

    def test_expired_sessions_are_pruned_in_passing_a_few_at_a_time(self):
        self.add_user()
        live = self.open_session()
        session = self.identity(live).session
        with self.store.transaction() as run:
            marks = ", ".join("?" * 10)
            for number in range(25):
                row = dataclasses.replace(session, id=f"expired{number:015}", expires=NOW - number)
                run(f"INSERT INTO auth_session ({server.SESSION}) VALUES ({marks})", *dataclasses.astuple(row))
        self.open_session()
        self.assertEqual(len(self.rows()), 15 + 2)
        for left in [5 + 2, 2, 2]:
            live = self.sign_in.refresh(live["refresh_token"], NOW + 1)
            self.assertEqual(len(self.rows()), left)
        self.assertTrue(self.identity(live, NOW + 1))

    def count_reads(self, tokens, now=NOW):
        with mock.patch.object(self.store, "_run", wraps=self.store._run) as run:
            self.identity(tokens, now)
        return run.call_count

    def test_what_was_read_serves_until_anybody_commits(self):
        self.settings = dataclasses.replace(self.settings, session_cache=60)
        self.add_user()
        tokens, other = self.open_session(), self.open_session()
        self.assertEqual([self.count_reads(tokens), self.count_reads(tokens), self.count_reads(other)], [1, 0, 1])
        self.store.add_user("bob", "x")
        self.assertEqual([self.count_reads(tokens), self.count_reads(tokens)], [1, 0])
        changes = [
            ("sign-out", lambda: self.sign_in.logout(self.identity(tokens), "local")),
            ("lock", lambda: self.sign_in.lock(self.store.find_user("alice"))),
            ("remove", lambda: self.store.remove_user(1)),
        ]
        for name, change in changes:
            tokens = self.open_session()
            self.assertEqual(self.count_reads(tokens, NOW + 1), 1)
            self.assertEqual(self.count_reads(tokens, NOW + 1), 0)
            change()
            with self.subTest(name):
                self.assert_ended(tokens, NOW + 1)
            if name == "lock":
                self.sign_in.unlock(self.store.find_user("alice"))

    def test_what_others_commit_is_seen(self):
        """At once on SQLite; on MySQL at once unless session_cache says for how long not."""
        for seconds in (0, 20):
            self.settings = dataclasses.replace(self.settings, session_cache=seconds)
            self.sign_in = server.open_sign_in(self.settings)
            self.addCleanup(self.sign_in.close)
            if not seconds:
                self.add_user()
            tokens = self.open_session()
            self.assertTrue(self.identity(tokens, NOW))
            self.raw_sql("DELETE FROM auth_session")
            if seconds and self.database.startswith("mysql"):
                self.assertTrue(self.identity(tokens, NOW + 1))
            self.assert_ended(tokens, NOW + seconds)

    def test_memory_is_bounded_under_many_tokens_and_sessions(self):
        self.add_user()
        tokens = self.open_session()
        identity = self.identity(tokens)
        key = self.sign_in.keys.keys[0]
        with mock.patch("server.REMEMBERED", 50):
            for number in range(120):
                claims = {"exp": NOW + 300, "iat": NOW, "nbf": NOW, "identity": 1, "jti": str(number)}
                self.sign_in.authenticate(jwt.encode(claims, key.signer, headers={"kid": key.kid}), NOW)
                made = self.sign_in.make_api_token(identity, "x", 100, NOW)
                self.identity(made)
                for bad in [f"{made['access_token']}x", "x" * number]:
                    with self.assertRaises(server.InvalidToken):
                        self.sign_in.authenticate(bad, NOW)
                self.assertLessEqual(len(self.sign_in.keys._verified), 50)
                self.assertLessEqual(len(self.store._remembered[1]), 50)
        self.assertTrue(self.identity(tokens))

    def test_session_and_user_are_read_in_one_query(self):
        self.add_user()
        tokens = self.open_session()
        with mock.patch.object(self.store, "_run", wraps=self.store._run) as run:
            self.identity(tokens)
        self.assertEqual(run.call_count, 1)

    def test_a_removed_users_sessions_go_with_the_user(self):
        self.add_user()
        tokens = self.open_session()
        self.store.remove_user(1)
        self.assert_ended(tokens)
        self.assertEqual(self.rows(), [])

    def test_a_stolen_database_gives_no_way_in(self):
        self.settings = dataclasses.replace(self.settings, throttle_address=0, throttle_name=0)
        self.add_user()
        with self.assertLogs("auth", "DEBUG") as logged:
            tokens = self.open_session(name="curl/8", address="192.0.2.1")
            tokens = self.sign_in.refresh(tokens["refresh_token"], NOW + 1)
            api_token = self.sign_in.make_api_token(self.identity(tokens), "backup", 1000, NOW)
            logging.getLogger("auth").info("end")
        stored = {
            value
            for table in ("user", "auth_session")
            for row in self.raw_sql(f"SELECT * FROM {table}")
            for value in row
        }
        texts = {str(value) for value in stored} | set(" ".join(logged.output).split())
        for value in {part for text in texts for part in [text, *re.split(r"[$:]", text)]}:
            for attempt in [value, f"{value}.2.{value}", f"{value}.2.", f"{value}..", f"Bearer {value}"]:
                with self.assertRaises(server.AuthError):
                    self.sign_in.authenticate(attempt, NOW)
                with self.assertRaises(server.AuthError):
                    self.sign_in.refresh(attempt, NOW)
            with self.assertRaises(server.InvalidCredentials):
                self.sign_in.login("alice", value, NOW)
            self.store.forget_failures(self.sign_in.keys.digest("alice", NOW))
        for secret in [tokens["refresh_token"], tokens["access_token"], api_token["access_token"]]:
            self.assertFalse([value for value in texts if secret in value or secret.rpartition(".")[2] in value])


@on_each_engine
class ThrottleTest:
    """Failed sign-ins, by `now`."""

    HOME, AWAY = "192.0.2.1", "198.51.100.1"

    def setUp(self):
        super().setUp()
        self.add_user()

    def attempt(self, now, password="wrong", username="alice", address=AWAY, sign_in=None):
        """Seconds to wait; 0 for a password that was looked at and wrong; None for a good sign-in."""
        try:
            (sign_in or self.sign_in).login(username, password, now, address=address)
        except server.InvalidCredentials:
            return 0
        except server.TooManyRequests as refused:
            return int(refused.get_header("Retry-After"))

    def test_after_five_failures_in_a_row_each_next_one_waits_twice_as_long(self):
        self.assertEqual([self.attempt(NOW) for _ in range(6)], [0, 0, 0, 0, 0, 1])
        now = NOW
        for wait in [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 900, 900]:
            self.assertEqual(self.attempt(now + wait - 0.5), 1)
            self.assertEqual(self.attempt(now), wait)
            now += wait
            self.assertEqual(self.attempt(now), 0)
            self.store.prune_counts(now, 100)

    def test_meanwhile_the_right_password_is_refused_too_without_hashing(self):
        for _ in range(5):
            self.attempt(NOW)
        with mock.patch("hashlib.pbkdf2_hmac", wraps=hashlib.pbkdf2_hmac) as hashing:
            self.assertEqual(self.attempt(NOW, "correct horse"), 1)
        self.assertEqual(hashing.call_count, 0)
        self.assertIsNone(self.attempt(NOW, "correct horse", address=self.HOME))
        self.assertIsNone(self.attempt(NOW + 1, "correct horse"))

    def test_a_good_sign_in_from_there_forgets_the_failures(self):
        for _ in range(2):
            self.assertEqual([self.attempt(NOW) for _ in range(4)], [0] * 4)
            self.assertIsNone(self.attempt(NOW, "correct horse"))

    def test_after_an_hour_they_are_forgotten(self):
        for _ in range(5):
            self.attempt(NOW)
        self.assertEqual([self.attempt(NOW + 3600) for _ in range(6)], [0, 0, 0, 0, 0, 1])

    def test_a_brute_force_of_one_minute_gets_few_hashes(self):
        with mock.patch("server.verify_password", wraps=server.verify_password) as hashing:
            for hundredth in range(6000):
                self.attempt(NOW + hundredth / 100)
        self.assertLess(hashing.call_count, 20)

    def test_an_address_over_all_names(self):
        for number in range(50):
            self.assertEqual(self.attempt(NOW + number, username=f"name{number}"), 0)
        self.assertEqual(self.attempt(NOW + 50, "correct horse"), 550)
        self.assertIsNone(self.attempt(NOW + 50, "correct horse", address=self.HOME))
        self.assertIsNone(self.attempt(NOW + 600, "correct horse"))

    def test_a_name_over_all_addresses_but_never_from_its_users_own(self):
        self.assertIsNone(self.attempt(NOW - 29 * 86400, "correct horse", address=self.HOME))
        for number in range(100):
            self.assertEqual(self.attempt(NOW, address=f"198.51.100.{number}"), 0)
        self.assertEqual(self.attempt(NOW, "correct horse", address="203.0.113.1"), 3600)
        self.assertIsNone(self.attempt(NOW, "correct horse", address=self.HOME))
        self.assertIsNone(self.attempt(NOW + 3600, "correct horse", address="203.0.113.1"))

    def test_a_home_is_one_for_thirty_days(self):
        self.assertIsNone(self.attempt(NOW - 31 * 86400, "correct horse", address=self.HOME))
        for number in range(100):
            self.attempt(NOW, address=f"198.51.100.{number}")
        self.assertEqual(self.attempt(NOW, "correct horse", address=self.HOME), 3600)

    def test_an_unknown_name_is_counted_like_a_known_one(self):
        answers = [[self.attempt(NOW, username=name, address=name) for _ in range(7)] for name in ["alice", "nobody"]]
        self.assertEqual(answers[0], answers[1])

    def test_addresses_of_one_ipv6_network_are_one(self):
        for number in range(5):
            self.attempt(NOW, address=f"2001:db8:1:2::{number:x}")
        self.assertEqual(self.attempt(NOW, address="2001:db8:1:2:ffff::1"), 1)
        self.assertEqual(self.attempt(NOW, address="2001:db8:1:3::1"), 0)
        for address, network in [
            ("192.0.2.1", "192.0.2.1"),
            ("::ffff:192.0.2.1", "192.0.2.1"),
            ("::1", "::/64"),
            ("localhost", "localhost"),
            ("", "unknown"),
            ("[2001:db8::1]:443", "2001:db8::/64"),
            ("[2001:db8::1]", "2001:db8::/64"),
            ("x" * 100, "x" * 45),
        ]:
            self.assertEqual(server.network_of(address), network)

    def test_processes_share_the_counts_and_a_restart_forgets_nothing(self):
        with contextlib.closing(server.open_sign_in(self.settings)) as other:
            for sign_in in [self.sign_in, other, self.sign_in, other, self.sign_in]:
                self.attempt(NOW, sign_in=sign_in)
        with contextlib.closing(server.open_sign_in(self.settings)) as restarted:
            self.assertEqual(self.attempt(NOW, sign_in=restarted), 1)

    def test_of_many_at_once_none_is_lost(self):
        self.settings = dataclasses.replace(self.settings, throttle_pair=0, throttle_address=0, throttle_name=0)
        self.sign_in = server.open_sign_in(self.settings)
        self.addCleanup(self.sign_in.close)
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            self.assertEqual(set(pool.map(lambda _: self.attempt(NOW), range(64))), {0})
        counted = self.raw_sql("SELECT failures FROM auth_throttle")
        self.assertEqual(counted, [(64,)] * 3)

    def test_many_at_once_do_not_get_past_the_limits(self):
        self.settings = dataclasses.replace(self.settings, throttle_pair=0, throttle_address=20, throttle_name=0)
        self.sign_in = server.open_sign_in(self.settings)
        self.addCleanup(self.sign_in.close)
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: self.attempt(NOW), range(64)))
        self.assertEqual(answers.count(0), 20)

    def test_zero_switches_a_limit_off(self):
        self.settings = dataclasses.replace(self.settings, throttle_pair=0, throttle_address=0, throttle_name=7)
        self.sign_in = server.open_sign_in(self.settings)
        self.addCleanup(self.sign_in.close)
        self.assertEqual([self.attempt(NOW) for _ in range(8)], [0] * 7 + [3600])

    def test_unlocking_a_user_forgets_the_failures_of_the_name(self):
        for number in range(105):
            self.attempt(NOW, address=f"198.51.100.{number % 20}")
        self.sign_in.unlock(self.store.find_user("alice"))
        self.assertEqual(self.attempt(NOW, address="203.0.113.1"), 0)
        self.assertIsNone(self.attempt(NOW, "correct horse", address="198.51.100.1"))

    def test_the_table_stays_bounded(self):
        self.settings = dataclasses.replace(self.settings, throttle_address=0)
        self.sign_in = server.open_sign_in(self.settings)
        self.addCleanup(self.sign_in.close)
        for number in range(200):
            self.attempt(NOW + 60 * number, username=f"name{number}", address=f"2001:db8:{number:x}::1")
        [(rows,)] = self.raw_sql("SELECT COUNT(*) FROM auth_throttle")
        self.assertLessEqual(rows, 60 * 3 + 20)

    def test_names_do_not_stand_in_the_table(self):
        self.attempt(NOW, username="typed my password here")
        self.assertNotIn("typed", str(self.raw_sql("SELECT * FROM auth_throttle")))

    def test_the_answer_is_429_with_retry_after(self):
        fields = {"username": "alice", "password": "wrong"}
        while self.client.post_json("/auth", fields, status="*").status_int == 401:
            pass
        answer = self.client.post_json("/auth", fields, status=429)
        wait = int(answer.headers["Retry-After"])
        self.assert_refused(answer, 429, "Too Many Requests", f"Too many failed sign-ins; try again in {wait} s")
        self.assertGreater(wait, 0)
        forged = {"X-Forwarded-For": "203.0.113.9"}
        self.client.post_json("/auth", fields, headers=forged, status=429)


class HashQueueTest(Case):
    def test_only_so_many_hash_and_wait_and_the_rest_hear_so_at_once(self):
        queue, told = server.HashQueue(), []
        queue.on_change = told.append
        inside, release = [], threading.Event()

        def work():
            with queue.turn():
                inside.append(1)
                release.wait(30)

        threads = [threading.Thread(target=work) for _ in range(queue.SIZE)]
        try:
            for thread in threads:
                thread.start()
            wait_for(lambda: len(inside) == queue.CORES and queue.inside == queue.SIZE)
            with self.assertRaises(server.Unavailable) as refused, queue.turn():
                pass
            self.assertEqual(refused.exception.get_header("Retry-After"), "1")
        finally:
            release.set()
            for thread in threads:
                thread.join(30)
        self.assertEqual(len(inside), queue.SIZE)
        self.assertEqual((max(told), told[-1]), (queue.SIZE, 0))
        with queue.turn():
            self.assertEqual(told[-1], 1)

    def test_every_check_costs_as_much_as_the_costliest_hash_that_was_seen(self):
        self.settings = dataclasses.replace(self.settings, pbkdf2_iterations=2000)
        self.store.add_user("cheap", server.hash_password("correct horse", 1))
        self.store.add_user("costly", server.hash_password("correct horse", 5000))
        self.store.add_user("absurd", server.hash_password("correct horse", 100_000))
        for name, rounds in [("nobody", 2000), ("cheap", 2000), ("costly", 5000), ("cheap", 5000), ("nobody", 5000)] + [
            ("absurd", 100_000),
            ("nobody", 8000),  # one absurd row does not slow everybody down without bounds
        ]:
            with mock.patch("hashlib.pbkdf2_hmac", wraps=hashlib.pbkdf2_hmac) as hashing:
                with self.assertRaises(server.InvalidCredentials):
                    self.sign_in.login(name, "wrong", NOW)
                spent = [call.kwargs.get("iterations") or call.args[3] for call in hashing.call_args_list]
            self.assertEqual(sum(spent), rounds, name)


class RulesTest(unittest.TestCase):
    def test_a_new_password_that_is_refused_hears_which_rule_it_breaks(self):
        for password, words in [
            *((password, "8 to 1024 characters") for password in ["", "seven77", "x" * 1025, None, 5, "\ud800" * 8]),
            *((password, "not the user name") for password in ["alice.liddell", "ALICE.Liddell"]),
            *((password, "commonest") for password in ["password", "PASSWORD123", "12345678", "qwertyuiop"]),
        ]:
            with self.subTest(password), self.assertRaisesRegex(server.BadRequest, words):
                server.check_new_password(password, "alice.liddell")
        for password in ["eight888", "x" * 1024, "пароль пароль", "correct horse"]:
            server.check_new_password(password, "alice.liddell")
        self.assertTrue(all(len(password) >= 8 for password in server.COMMON_PASSWORDS))


class EventTest(Case):
    """What happened, one line of JSON each."""

    def test_each_event_is_one_line_of_json_whatever_clients_put_in_it(self):
        evil = 'x"}\n{"event": "login"\r\n\u2028\x1b[31m\x00'
        with self.assertLogs("auth", "DEBUG") as logged:
            self.add_user()
            tokens = self.sign_in.login("alice", "correct horse", NOW, name=evil, address="192.0.2.1")
            for _ in range(6):
                with self.assertRaises(server.AuthError):
                    self.sign_in.login(evil, "wrong horse", NOW, address="192.0.2.1")
            refreshed = self.sign_in.refresh(tokens["refresh_token"], NOW + 1)
            identity, _ = self.sign_in.authenticate(refreshed["access_token"], NOW + 1)
            self.sign_in.make_api_token(identity, "backup", 100, NOW + 1)
            self.sign_in.change_password(identity, "correct horse", "battery staple", NOW + 1)
            with self.assertRaises(server.SessionEnded):
                self.sign_in.refresh(tokens["refresh_token"], NOW + 20)
            bob = self.store.get_user(self.sign_in.add_user("bob", "battery staple"))
            self.sign_in.lock(bob)
            self.sign_in.unlock(self.store.get_user(bob.id))
            self.sign_in.logout(server.Identity(bob.id, "bob"), "global")
            self.sign_in.remove_user(bob)
        lines = [record.getMessage() for record in logged.records]
        events = [json.loads(line) for line in lines]
        self.assertEqual(
            [event["event"] for event in events],
            ["login", *["login_failed"] * 5, "throttled", "refresh", "token_created", "password_changed"]
            + ["reuse_detected", "user_added", "user_locked", "user_unlocked", "logout", "user_removed"],
        )
        self.assertFalse([line for line in lines if not line.isascii() or not line.isprintable()])
        self.assertEqual(events[1]["name"], evil)
        first = {"event": "login", "user": 1, "name": "alice", "address": "192.0.2.1", "session": identity.session.id}
        self.assertEqual({name: value for name, value in events[0].items() if name != "time"}, first)
        self.assertTrue(datetime.datetime.fromisoformat(events[0]["time"]))
        for secret in [
            *tokens.values(),
            *refreshed.values(),
            "correct horse",
            "wrong horse",
            "battery",
            "pbkdf2",
            SECRET,
        ]:
            if isinstance(secret, str) and secret != "Bearer":
                self.assertNotIn(secret, "".join(lines))


# --- Plugin ---


class PluginTest(Case):
    def setUp(self):
        super().setUp()
        self.own = bottle.Bottle()
        self.plugin = self.own.install(type("Own", (JWTPlugin,), {})(secret_key=SECRET))
        self.own_client = webtest.TestApp(self.own)

    def test_every_route_is_closed_that_does_not_say_public_true(self):
        def undeclared(callback):
            return lambda *args, **values: callback(*args, **values)

        self.own.route("/plain", callback=lambda: "in")
        self.own.route("/wrapped", callback=undeclared(lambda: "in"))
        self.own.route("/string", callback=lambda: "in", public="True")
        self.own.route("/one", callback=lambda: "in", public=1)
        self.own.route("/false", callback=lambda: "in", public=False)
        self.own.route("/any", "ANY", callback=lambda: "in")
        self.own.route("/open", callback=lambda: "in", public=True)
        for path in ["/plain", "/wrapped", "/string", "/one", "/false", "/any"]:
            with self.subTest(path):
                answer = self.own_client.get(path, status=401)
                self.assert_refused(answer, 401, "Authorization Required")
                authorization = {"Authorization": f"JWT {self.token()}"}
                self.assertEqual(self.own_client.get(path, headers=authorization).text, "in")
        self.assertEqual(self.own_client.get("/open").text, "in")

    def test_the_configuration_of_the_app_opens_nothing(self):
        self.own.route("/plain", callback=lambda: "in")
        self.own.config["public"] = True
        self.own.route("/later", callback=lambda: "in")
        self.own_client.get("/plain", status=401)
        self.own_client.get("/later", status=401)

    def test_what_would_skip_the_plugin_is_refused_when_it_is_declared(self):
        def child():
            app = bottle.Bottle()
            app.route("/x", callback=lambda: "come-in")
            return app

        for declare in [
            lambda app: app.route("/a", callback=lambda: "come-in", skip=True),
            lambda app: app.route("/b", callback=lambda: "come-in", skip=["x", True]),
            lambda app: app.route("/c", callback=lambda: "come-in", skip=[self.plugin]),
            lambda app: app.route("/c", callback=lambda: "come-in", skip=[type(self.plugin)]),
            lambda app: app.mount("/d/", child()),
            lambda app: app.merge(child()),
            lambda app: app.mount("/e/", lambda environ, start: [b"come-in"]),
        ]:
            with self.assertRaisesRegex(bottle.PluginError, "would skip JWTPlugin"):
                declare(self.own)
            other = bottle.Bottle()
            with contextlib.suppress(bottle.PluginError):
                declare(other)
                with self.assertRaisesRegex(bottle.PluginError, "would skip JWTPlugin"):
                    other.install(self.plugin)
        for path in ["/a", "/b", "/c", "/d/x", "/x", "/e/"]:
            self.assertNotIn("come-in", self.own_client.get(path, status="*").text, path)

    def test_a_plugin_of_another_name_or_a_second_one_does_not_push_it_off(self):
        class Other:
            name, api = "jwt", 2

            def apply(self, callback, route):
                return callback

        self.own.install(Other())
        self.own.route("/plain", callback=lambda: "in", apply=Other())
        self.own_client.get("/plain", status=401)
        with self.assertRaisesRegex(bottle.PluginError, "has a JWTPlugin already"):
            self.own.install(JWTPlugin(secret_key=SECRET))

    def test_a_handler_gets_what_it_names(self):
        def wrapped(callback):
            return functools.wraps(callback)(lambda *args, **values: callback(*args, **values))

        self.own.route("/identity", callback=lambda identity: {"id": identity.id, "name": identity.username})
        self.own.route("/claims", callback=wrapped(lambda claims: claims))
        self.own.route(
            "/both/<word>", callback=lambda word, identity, claims: {"both": [word, identity.id, claims["jti"]]}
        )
        headers = {"Authorization": f"bEaReR  {self.token(jti='x')}"}
        self.assertEqual(self.own_client.get("/identity", headers=headers).json, {"id": 1, "name": None})
        self.assertEqual(self.own_client.get("/claims", headers=headers).json["identity"], 1)
        self.assertEqual(self.own_client.get("/both/w", headers=headers).json, {"both": ["w", 1, "x"]})

    def test_a_path_cannot_name_the_identity(self):
        for rule in ["/<identity>", "/x/<claims:re:.*>", "/:identity"]:
            with self.subTest(rule), self.assertRaisesRegex(bottle.PluginError, "from the path"):
                self.own.route(rule, callback=lambda **values: str(values))

    def test_a_public_route_that_wants_an_identity_is_refused_when_it_is_declared(self):
        with self.assertRaisesRegex(bottle.PluginError, "public, so it has no identity"):
            self.own.route("/", callback=lambda identity: "in", public=True)

    def test_only_a_key_is_enough_and_a_weak_one_is_not(self):
        for secret in ["secret-key", "x" * 31]:
            with self.subTest(secret), self.assertRaises(SettingsError):
                JWTPlugin(secret_key=secret)
        self.own.route("/", callback=lambda: "in")
        self.assert_refused(
            self.own_client.get("/", headers={"Authorization": "JWT x"}, status=401), 401, "Invalid token"
        )

    def test_with_a_database_each_request_looks_its_user_up(self):
        self.add_user()
        app = bottle.Bottle()
        app.install(JWTPlugin(secret_key=SECRET, database=self.database))
        self.addCleanup(app.close)
        app.route("/", callback=lambda identity: identity.username)
        client, headers = webtest.TestApp(app), {"Authorization": f"JWT {self.token()}"}
        self.assertEqual(client.get("/", headers=headers).text, "alice")
        self.store.remove_user(1)
        self.assert_refused(client.get("/", headers=headers, status=401), 401, "Invalid JWT", "User does not exist")

    def test_the_service_can_be_mounted_and_merged(self):
        self.add_user()
        for prefix, join in [("/api", lambda root, app: root.mount("/api/", app)), ("", bottle.Bottle.merge)]:
            root = bottle.Bottle()
            join(root, make_app(self.settings, self.sign_in))
            client = webtest.TestApp(root)
            with self.subTest(prefix):
                body = {"username": "alice", "password": "correct horse"}
                token = client.post_json(f"{prefix}/auth", body).json["access_token"]
                self.assert_refused(client.get(f"{prefix}/auth/me", status=401), 401, "Authorization Required")
                answer = client.get(f"{prefix}/auth/me", headers={"Authorization": f"JWT {token}"})
                self.assertEqual(answer.json["username"], "alice")
                self.assert_refused(
                    client.post(f"{prefix}/auth", "x", {"Content-Type": "text/plain"}, status=400), 400, "Bad Request"
                )


class RemotePluginTest(Case):
    """An app on another host: no database, no secret, only the published keys."""

    def setUp(self):
        super().setUp()
        path = self.folder / "auth.keys"
        server.rotate_key_file(path, "EdDSA")
        self.settings = dataclasses.replace(self.settings, secret_key="", keys=str(path))
        self.add_user()
        self.tokens = self.client.post_json("/auth", {"username": "alice", "password": "correct horse"}).json

    @contextlib.contextmanager
    def issuer(self, app, port=0):
        """Serve `app` on loopback; give its port."""
        with socket.create_server(("127.0.0.1", port)) as listener:
            running = waitress.create_server(app, sockets=[listener], threads=2, clear_untrusted_proxy_headers=True)
            thread = threading.Thread(target=running.run)
            thread.start()
            try:
                yield listener.getsockname()[1]
            finally:
                with contextlib.suppress(OSError):
                    running.trigger.pull_trigger(running.close)
                running.asyncore.close_all(running._map)
                thread.join(30)
                running.task_dispatcher.shutdown()

    def other_host(self, port):
        app = bottle.Bottle()
        app.install(JWTPlugin(jwks_url=f"http://127.0.0.1:{port}/.well-known/jwks.json"))
        app.route("/", callback=lambda identity: {"id": identity.id, "username": identity.username})
        return webtest.TestApp(app)

    def ask(self, host, token, status=200):
        return host.get("/", headers={"Authorization": f"Bearer {token}"}, status=status)

    def test_published_keys_are_enough(self):
        with self.issuer(self.app) as port:
            host = self.other_host(port)
            self.assertEqual(self.ask(host, self.tokens["access_token"]).json, {"id": 1, "username": None})
            self.assert_refused(host.get("/", status=401), 401, "Authorization Required")
            for bad in ["x", self.token(), self.tokens["refresh_token"], self.tokens["access_token"][:-3] + "AAA"]:
                self.assert_refused(self.ask(host, bad, 401), 401, "Invalid token")
            identity, _ = self.sign_in.authenticate(self.tokens["access_token"], time.time())
            long = self.sign_in.make_api_token(identity, "backup", 86400, time.time())
            self.assert_refused(self.ask(host, long["access_token"], 401), 401, "Invalid token")
        self.ask(host, self.tokens["access_token"])  # from what was fetched, though the issuer is gone

    def test_a_fetch_that_fails_is_503_and_heals(self):
        port = free_port()
        host = self.other_host(port)
        with self.assertLogs("auth", "ERROR"):
            answer = self.ask(host, self.tokens["access_token"], 503)
        self.assert_refused(answer, 503, "Service Unavailable", "The issuer's public keys are not to be had; try again")
        self.assertIn("Retry-After", answer.headers)
        with self.issuer(self.app, port):
            wait_for(lambda: self.ask(host, self.tokens["access_token"], "*").status_int == 200)

    def test_an_issuer_that_answers_nonsense_is_503(self):
        for body in [
            "",
            "x",
            "[]",
            "{}",
            '{"keys": []}',
            '{"keys": [{"kty": "oct", "k": "AAAA", "alg": "none"}]}',
            "\xff",
        ]:
            app = bottle.Bottle()
            app.route("/.well-known/jwks.json", callback=lambda body=body: body.encode("latin-1"))
            with self.issuer(app) as port, self.subTest(body), self.assertLogs("auth", "ERROR"):
                self.assert_refused(
                    self.ask(self.other_host(port), self.tokens["access_token"], 503), 503, "Service Unavailable"
                )

    def test_a_published_secret_is_nobodys_key(self):
        jwk = server.new_jwk("HS256")
        app = bottle.Bottle()
        app.route("/.well-known/jwks.json", callback=lambda: {"keys": [jwk]})
        with self.issuer(app) as port:
            now = int(time.time())
            token = KeySet([server.Key.from_jwk(jwk)]).sign({"exp": now + 9, "iat": now, "nbf": now, "identity": 1})
            self.assert_refused(self.ask(self.other_host(port), token, 401), 401, "Invalid token")

    def test_a_url_that_is_none_is_refused(self):
        for url in ["file:///etc/passwd", "jwks.json"]:
            with self.assertRaisesRegex(SettingsError, "jwks_url"):
                JWTPlugin(jwks_url=url)


# --- HTTP ---


@on_each_engine
class WireTest:
    """The rows of the wire and error tables."""

    def test_auth_answers_json_and_forms(self):
        self.add_user()
        fields = {"username": "alice", "password": "correct horse", "remember": "ignored"}
        for answer in [self.client.post_json("/auth", fields), self.client.post("/auth", fields)]:
            self.assertEqual(list(answer.json), ["access_token", "token_type", "expires_in", "refresh_token"])
            self.assertEqual(answer.headers["Cache-Control"], "no-store")
            self.assertEqual(answer.content_type, "application/json")
            self.assertTrue(answer.text.endswith("}\n"))
            self.get("/rest-auth", answer.json["access_token"])

    def test_rest_auth_greets(self):
        self.add_user()
        for scheme in ["JWT", "jwt", "Bearer", "BEARER"]:
            answer = self.client.get("/rest-auth", headers={"Authorization": f"{scheme} {self.login()}"})
            self.assertEqual(answer.json, "You are an authenticate person to see this message")

    def test_me_says_who_is_calling_and_in_which_session(self):
        user_id = self.add_user("álice")
        now = int(time.time())
        fields = {"username": "álice", "password": "correct horse"}
        environ = {"REMOTE_ADDR": "192.0.2.7"}
        headers = {"User-Agent": "x" * 300}
        answer = self.client.post_json("/auth", fields, headers=headers, extra_environ=environ)
        me = self.get("/auth/me", answer.json["access_token"]).json
        self.assertEqual((me["id"], me["username"]), (user_id, "álice"))
        session = me["session"]
        members = ["id", "name", "address", "created", "last_used", "expires", "api_token", "current"]
        self.assertEqual(list(session), members)
        self.assertEqual((session["name"], session["address"]), ("x" * 255, "192.0.2.7"))
        self.assertEqual((session["api_token"], session["current"]), (False, True))
        self.assertAlmostEqual(session["created"], now, delta=5)
        self.assertEqual(session["expires"], session["created"] + self.settings.session_ttl)
        self.assertIsNone(self.get("/auth/me", self.token(identity=user_id)).json["session"])

    def test_health(self):
        self.assertEqual(self.client.get("/health").json, {"status": "ok"})

    def test_the_error_table(self):
        self.add_user()
        token = self.login()
        for authorization, error, description in [
            (None, "Authorization Required", "Request does not contain an access token"),
            ("", "Authorization Required", "Request does not contain an access token"),
            (" ", "Authorization Required", "Request does not contain an access token"),
            (f"Basic {token}", "Invalid JWT header", "Unsupported authorization type"),
            (token, "Invalid JWT header", "Unsupported authorization type"),
            ("JWT", "Invalid JWT header", "Token missing"),
            ("Bearer ", "Invalid JWT header", "Token missing"),
            (f"JWT {token} x", "Invalid JWT header", "Token contains spaces"),
            (f"JWT {token}, JWT {token}", "Invalid JWT header", "Token contains spaces"),  # two Authorization lines
            (f"JWT\t{token}", "Invalid JWT header", "Unsupported authorization type"),
            (f"JWT\xa0{token}", "Invalid JWT header", "Unsupported authorization type"),
            (f"JWT {token}x", "Invalid token", None),
            (f"JWT {token[:-9]}", "Invalid token", None),
            ("JWT \xff\xfe", "Invalid token", None),
            ("JWT \x00", "Invalid token", None),
            ("JWT x", "Invalid token", "Not enough segments"),
            ("JWT ..", "Invalid token", None),
            (f"JWT {self.token(secret='x' * 32)}", "Invalid token", "Signature verification failed"),
            (f"JWT {self.token(exp=1)}", "Invalid token", "Signature has expired"),
            (f"JWT {self.token(identity=99)}", "Invalid JWT", "User does not exist"),
        ]:
            with self.subTest(authorization):
                headers = {} if authorization is None else {"Authorization": authorization}
                answer = self.client.get("/rest-auth", headers=headers, status=401)
                self.assert_refused(answer, 401, error, description)
                sent = ', error="invalid_token"' if error in ("Invalid token", "Invalid JWT") else ""
                challenges = ['JWT realm="Login Required"', f'Bearer realm="Login Required"{sent}']
                self.assertEqual(answer.headers.getall("WWW-Authenticate"), challenges)

    def test_a_removed_users_token_ends_with_the_next_request(self):
        self.add_user()
        token = self.login()
        self.store.remove_user(1)
        self.assert_refused(self.get("/auth/me", token, status=401), 401, "Invalid token", "Session has ended")
        self.assertEqual(self.raw_sql("SELECT COUNT(*) FROM auth_session"), [(0,)])

    def test_so_does_that_of_a_user_whom_somebody_deletes_by_sql(self):
        self.add_user()
        token = self.login()
        self.raw_sql("DELETE FROM user")
        self.assert_refused(self.get("/auth/me", token, status=401), 401, "Invalid JWT", "User does not exist")

    def test_the_realm_is_a_setting(self):
        self.settings = dataclasses.replace(self.settings, realm="The shed")
        answer = self.client.get("/rest-auth", status=401)
        self.assertEqual(answer.headers.getall("WWW-Authenticate")[0], 'JWT realm="The shed"')

    def test_unknown_paths_and_methods_answer_json(self):
        self.assert_refused(self.client.get("/nowhere", status=404), 404, "Not Found")
        answer = self.client.delete("/auth", status=405)
        self.assert_refused(answer, 405, "Method Not Allowed")
        self.assertEqual(answer.headers["Allow"], "POST,OPTIONS")
        self.assert_refused(self.client.request("/auth", method="PATCH", status=405), 405, "Method Not Allowed")

    def test_head_and_options(self):
        self.add_user()
        headers = {"Authorization": f"JWT {self.login()}"}
        self.assertEqual(self.client.head("/rest-auth", headers=headers).headers["Content-Length"], "53")
        self.assertEqual(self.client.head("/rest-auth", status=401).text, "")
        for path, allow in [("/rest-auth", "GET,HEAD,OPTIONS"), ("/auth", "POST,OPTIONS")]:
            answer = self.client.options(path)
            self.assertEqual((answer.status_int, answer.headers["Allow"], answer.text), (204, allow, ""))
        self.assert_refused(self.client.options("/nowhere", status=404), 404, "Not Found")

    def test_what_a_handler_of_ones_own_aborts_with_keeps_its_words(self):
        for status in [400, 404, 405, 409, 418, 499, 599]:
            self.app.route(f"/{status}", callback=functools.partial(bottle.abort, status, "our words"), public=True)
            answer = self.client.get(f"/{status}", status=status)
            self.assertEqual((answer.json["status_code"], answer.json["description"]), (status, "our words"))

    def test_a_failure_inside_is_a_500_that_tells_nothing(self):
        self.app.route("/broken", callback=lambda: 1 / 0, public=True)
        answer = self.client.get("/broken", status=500, expect_errors=True)
        self.assert_refused(answer, 500, "Internal Server Error")
        self.assertNotIn("division", answer.text)

    def test_without_the_database_503(self):
        self.add_user()
        token = self.login()
        self.raw_sql("ALTER TABLE user RENAME TO gone")
        for answer in [
            self.get("/rest-auth", token, status=503),
            self.client.post_json("/auth", {"username": "alice", "password": "x"}, status=503),
        ]:
            self.assert_refused(answer, 503, "Service Unavailable", "The database does not answer; try again")
            self.assertGreater(int(answer.headers["Retry-After"]), 0)


@on_each_engine
class SessionWireTest:
    """The routes of sessions, over HTTP."""

    def setUp(self):
        super().setUp()
        self.add_user()
        self.tokens = self.sign_in_again()

    def sign_in_again(self):
        return self.client.post_json("/auth", {"username": "alice", "password": "correct horse"}).json

    def call(self, method, path, fields=None, tokens=None, status=None, form=False):
        headers = {"Authorization": f"Bearer {(tokens or self.tokens)['access_token']}"}
        body = "" if fields is None else urllib.parse.urlencode(fields) if form else json.dumps(fields)
        if fields is not None:
            headers["Content-Type"] = "application/x-www-form-urlencoded" if form else "application/json"
        return self.client.request(path, method=method, headers=headers, body=body.encode(), status=status)

    def test_refresh(self):
        for fields in [{"refresh_token": self.tokens["refresh_token"]}] * 2:
            for answer in [self.client.post_json("/auth/refresh", fields), self.client.post("/auth/refresh", fields)]:
                self.assertEqual(list(answer.json), ["access_token", "token_type", "expires_in", "refresh_token"])
                self.assertEqual(answer.headers["Cache-Control"], "no-store")
                self.call("GET", "/rest-auth", tokens=answer.json)

    def test_refresh_with_bad_input(self):
        for fields, status, error in [
            ({}, 400, "Bad Request"),
            ({"refresh_token": None}, 400, "Bad Request"),
            ({"refresh_token": 5}, 400, "Bad Request"),
            ({"refresh_token": [self.tokens["refresh_token"]]}, 400, "Bad Request"),
            ({"refresh_token": ""}, 401, "Invalid token"),
            ({"refresh_token": "\ud800"}, 401, "Invalid token"),
            ({"refresh_token": self.tokens["access_token"]}, 401, "Invalid token"),
            ({"refresh_token": self.tokens["refresh_token"][:-1]}, 401, "Invalid token"),
        ]:
            with self.subTest(fields):
                self.assert_refused(self.client.post_json("/auth/refresh", fields, status=status), status, error)
        self.call("POST", "/auth/logout")
        fields = {"refresh_token": self.tokens["refresh_token"]}
        self.assert_refused(
            self.client.post_json("/auth/refresh", fields, status=401), 401, "Invalid token", "Session has ended"
        )

    def test_logout(self):
        self.assertEqual(self.call("POST", "/auth/logout").status_int, 204)
        answer = self.call("GET", "/rest-auth", status=401)
        self.assert_refused(answer, 401, "Invalid token", "Session has ended")
        self.assertEqual(len(answer.headers.getall("WWW-Authenticate")), 2)
        for scope, alive in [("local", 401), ("others", 200), ("global", 401)]:
            mine, other = self.sign_in_again(), self.sign_in_again()
            self.assertEqual(self.call("POST", "/auth/logout", {"scope": scope}, mine, form=scope == "others").text, "")
            self.call("GET", "/rest-auth", tokens=mine, status=alive)
            self.call("GET", "/rest-auth", tokens=other, status=200 if scope == "local" else 401)

    def test_logout_with_bad_input(self):
        for scope in ["", "all", "LOCAL", None, 5, ["local"], {}]:
            with self.subTest(scope):
                self.assert_refused(self.call("POST", "/auth/logout", {"scope": scope}, status=400), 400, "Bad Request")
        self.call("GET", "/rest-auth")
        foreign = {"access_token": self.token()}
        self.assert_refused(self.call("POST", "/auth/logout", tokens=foreign, status=400), 400, "Bad Request")
        self.call("POST", "/auth/logout", {"scope": "global"}, foreign)
        self.call("GET", "/rest-auth", status=401)

    def test_password(self):
        fields = {"current_password": "correct horse", "new_password": "battery staple"}
        self.assert_refused(
            self.call("PUT", "/auth/password", fields | {"current_password": "x"}, status=400), 400, "Bad Request"
        )
        self.assertEqual(self.call("PUT", "/auth/password", fields).status_int, 204)
        self.call("GET", "/rest-auth")
        self.login("alice", "battery staple")

    def test_sessions_are_listed_and_ended_one_by_one(self):
        other = self.sign_in_again()
        self.store.add_user("bob", server.hash_password("correct horse", 1))
        bobs = self.client.post_json("/auth", {"username": "bob", "password": "correct horse"}).json
        listed = self.call("GET", "/auth/sessions").json
        self.assertEqual(sorted(session["current"] for session in listed), [False, True])
        [theirs] = self.call("GET", "/auth/sessions", tokens=bobs).json
        for secret in [other["refresh_token"].rpartition(".")[2], "generation", "kid"]:
            self.assertNotIn(secret, json.dumps(listed))
        for sid in [theirs["id"], "A" * 22, "x", "'", "A" * 21, "%00", "%F0%9F%98%80", "A" * 5000]:
            with self.subTest(sid[:30]):
                answer = self.call("DELETE", f"/auth/sessions/{sid}", status=404)
                self.assert_refused(answer, 404, "Not Found", "There is no such session")
        [other_id] = [session["id"] for session in listed if not session["current"]]
        self.assertEqual(self.call("DELETE", f"/auth/sessions/{other_id}").status_int, 204)
        self.call("DELETE", f"/auth/sessions/{other_id}", status=404)
        self.call("GET", "/rest-auth", tokens=other, status=401)
        self.assertEqual(len(self.call("GET", "/auth/sessions").json), 1)
        self.call("GET", "/rest-auth", tokens=bobs)

    def test_api_tokens(self):
        answer = self.call("POST", "/auth/tokens", {"name": "backup"}, status=201)
        self.assertEqual(list(answer.json), ["access_token", "token_type", "expires_in", "id", "name"])
        self.assertEqual((answer.json["expires_in"], answer.headers["Cache-Control"]), (90 * 86400, "no-store"))
        made = self.call("POST", "/auth/tokens", {"name": "cron", "expires_in": "3600"}, status=201, form=True).json
        self.assertEqual(made["expires_in"], 3600)
        self.call("GET", "/rest-auth", tokens=made)
        names = {session["name"] for session in self.call("GET", "/auth/sessions").json if session["api_token"]}
        self.assertEqual(names, {"backup", "cron"})
        for method, path in [("POST", "/auth/tokens"), ("PUT", "/auth/password")]:
            self.assert_refused(self.call(method, path, {"name": "x"}, made, status=403), 403, "Forbidden")
        self.call("DELETE", f"/auth/sessions/{made['id']}", status=204)
        self.call("GET", "/rest-auth", tokens=made, status=401)

    def test_api_tokens_with_bad_input(self):
        before = self.call("GET", "/auth/sessions").json
        for fields in [
            *({"name": name} for name in ["", None, 5, [], "x" * 256, "a\nb", "\ud800"]),
            {"expires_in": 60},
            *(
                {"name": "x", "expires_in": value}
                for value in [0, -1, 1.5, "60", "", None, True, [], 366 * 86400 + 1, 2**70]
            ),
        ]:
            with self.subTest(fields):
                self.assert_refused(self.call("POST", "/auth/tokens", fields, status=400), 400, "Bad Request")
        for value in ["-5", "1e3", "x", "", "9" * 30]:
            self.call("POST", "/auth/tokens", {"name": "x", "expires_in": value}, status=400, form=True)
        self.assertEqual(len(self.call("GET", "/auth/sessions").json), len(before))

    def test_bad_bodies_everywhere(self):
        for method, path in [
            *(("POST", "/auth/refresh"), ("POST", "/auth/logout"), ("PUT", "/auth/password"), ("POST", "/auth/tokens")),
        ]:
            for kind, body, status in [
                ("application/json", b"[]", 400),
                ("application/json", b"[" * 50_000, 400),
                ("text/plain", b"x", 400),
                ("application/json", b"x" * 70_000, 413),
            ]:
                headers = {"Authorization": f"JWT {self.tokens['access_token']}", "Content-Type": kind}
                answer = self.client.request(path, method=method, headers=headers, body=body, status=status)
                self.assert_refused(answer, status, {400: "Bad Request", 413: "Content Too Large"}[status])
        self.call("GET", "/rest-auth")

    def test_jwks(self):
        answer = self.client.get("/.well-known/jwks.json")
        self.assertEqual(answer.json, {"keys": []})
        self.assertEqual(answer.headers["Cache-Control"], "public, max-age=600")
        again = self.client.get("/.well-known/jwks.json", headers={"If-None-Match": answer.headers["ETag"]})
        self.assertEqual((again.status_int, again.text, again.headers["ETag"]), (304, "", answer.headers["ETag"]))


@on_each_engine
class BadInputTest:
    """Each is a 4xx in the shape of our errors; nothing is written, and the service goes on."""

    LONG = "x" * 100_000
    JSON = "application/json"
    FORM = "application/x-www-form-urlencoded"
    NOT_A_NAME = ["", 0, 1, -1.5, [], ["alice"], {}, {"$ne": ""}, None, True, "al\0ice", "\ud800", LONG, "' OR 1=1 -- "]

    def bodies(self):
        """(content type, body, status)"""
        for body in ["", "{", "x", '"alice"', "5", "null", "true", "[]", '["username"]', "[" * 100_000, '{"a":' * 9999]:
            yield self.JSON, body.encode(), (400, 413)
        yield self.JSON, b'{"username": "alice", "password": "correct h\xf6rse"}', (400,)
        yield self.JSON, '{"username": "alice", "password": "x"}'.encode("utf-16"), (400,)
        yield "application/json; charset=latin-1", '{"username": "älice", "password": "x"}'.encode("latin-1"), (400,)
        yield self.JSON, b'{"username": "' + b"x" * 1_000_000 + b'", "password": "x"}', (413,)
        for kind in ["", "text/plain", "text/html", "multipart/form-data", "application/xml", "\xff", ";", "a" * 5000]:
            yield kind, b'{"username": "alice", "password": "correct horse"}', (400,)
        for body in ["username=%FF&password=x", "a=1&" * 50, "\xff"]:
            yield self.FORM, body.encode("latin-1"), (400,)
        yield self.FORM, b'{"username": "alice", "password": "correct horse"}', (400,)  # curl -d without the header
        for body in ["", "username", "username=alice", "password=x", "username=alice&password=", "&&==", "%"]:
            yield self.FORM, body.encode(), (401,)
        for value in self.NOT_A_NAME:
            yield self.JSON, json.dumps({"username": value, "password": "correct horse"}).encode(), (401, 413)
            yield self.JSON, json.dumps({"username": "alice", "password": value}).encode(), (401, 413)
        yield self.JSON, b"{}", (401,)
        yield self.JSON, b'{"username": "alice"}', (401,)
        yield self.JSON, b'{"password": "correct horse"}', (401,)

    def tokens(self):
        def unsigned(header, claims):
            parts = [
                base64.urlsafe_b64encode(json.dumps(part).encode()).decode().strip("=") for part in (header, claims)
            ]
            return ".".join(parts)

        now = int(time.time())
        claims = {"exp": now + 300, "iat": now, "nbf": now, "identity": 1}
        for algorithm in ["none", "None", "NONE", "nOnE", "HS512", "RS256", "", None, 5, []]:
            yield unsigned({"typ": "JWT", "alg": algorithm}, claims) + "."
        yield unsigned({"alg": "HS256"}, claims) + "."
        yield self.token(algorithm="HS512")
        yield self.token(headers={"crit": ["exp"]})
        for name in ("exp", "iat", "nbf"):
            for value in [None, str(now), "soon", [now], {}, True, float("inf")]:
                yield self.token(**{name: value})
        for value in [None, "1", 1.0, True, [1], {"id": 1}, 0, -1, 2**70, "alice"]:
            yield self.token(identity=value)
        for header in [{"alg": "HS256", "crit": ["<b>zzz"]}, {"alg": 10**4000}]:
            yield unsigned(header, claims) + ".x"
        digits = base64.urlsafe_b64encode(b'{"alg":' + b"9" * 5000 + b"}").decode().strip("=")
        yield f"{digits}.{digits}.x"
        nested = base64.urlsafe_b64encode(b"[" * 3000).decode().strip("=")
        yield f"{nested}.{nested}.x"
        for header in [{"alg": "HS256", "kid": ["x"]}, {"alg": "HS256", "kid": 5}, [], "x"]:
            signed = unsigned(header, claims)
            digest = hmac.new(SECRET.encode(), signed.encode(), "sha256").digest()
            yield f"{signed}.{base64.urlsafe_b64encode(digest).decode().strip('=')}"
        yield self.LONG

    def test_bad_input(self):
        self.add_user()
        before = self.raw_sql("SELECT id, username, password FROM user")
        for kind, body, statuses in self.bodies():
            with self.subTest(kind=kind[:40], body=body[:60]):
                answer = self.client.post("/auth", body, {"Content-Type": kind}, status="*")
                self.assertIn(answer.status_int, statuses, answer.text)
                error = {400: "Bad Request", 401: "Bad Request", 413: "Content Too Large"}[answer.status_int]
                self.assert_refused(answer, answer.status_int, error)
        for token in self.tokens():
            with self.subTest(token=token[:80]):
                self.assert_refused(self.get("/rest-auth", token, status=401), 401, "Invalid token")
        self.assertEqual(self.raw_sql("SELECT id, username, password FROM user"), before)
        self.get("/rest-auth", self.login())

    def test_sql_is_just_characters(self):
        name = """'; DROP TABLE user; -- " ` \\' %s ? {} 😀"""
        self.add_user(name, "' OR '1'='1")
        self.assertEqual(self.get("/auth/me", self.login(name, "' OR '1'='1")).json["username"], name)


class StructureTest(Case):
    """What holds the file together."""

    def routes(self):
        return [(route.method, route.rule, server.is_public(route)) for route in self.app.routes]

    def test_every_route_that_is_not_public_answers_401_with_a_challenge_when_called_bare(self):
        closed = [route for route in self.routes() if not route[2]]
        self.assertTrue(closed)
        for method, rule, _ in closed:
            with self.subTest(rule):
                answer = self.client.request(rule, method=method, status=401)
                self.assert_refused(answer, 401, "Authorization Required")
                self.assertEqual(len(answer.headers.getall("WWW-Authenticate")), 2)

    def test_every_route_setting_and_command_is_in_the_readme(self):
        for method, rule, _ in self.routes():
            path = rule.replace("<sid>", "ID")
            self.assertIn(f"`{method} {path}`", README)
            self.assertRegex(server.__doc__, rf"{method} +{re.escape(path)} ")
        for field in dataclasses.fields(Settings):
            default = f"`{field.default}`" if field.default != "" else ""
            self.assertRegex(README, rf"\| `AUTH_{field.name.upper()}` \| {re.escape(default)} ?\|")
        for command in commands_of(server.make_parser()):
            self.assertRegex(README, rf"`server.py {command}[ `]", command)

    def test_every_example_of_help_works(self):
        for command in [[], *(command.split() for command in commands_of(server.make_parser()))]:
            with contextlib.redirect_stdout(io.StringIO()) as output:
                self.assertEqual(server.main([*command, "--help"]), 0)
            self.assertRegex(output.getvalue(), "--(database|keys) TEXT")

    def test_the_rooms_stand_in_the_order_of_the_design(self):
        rooms = re.findall(r"^# --- (.+) ---$", (HERE / "server.py").read_text("utf-8"), re.MULTILINE)
        names = "Events, Settings, Errors, Passwords, Store, Tokens, Sign-in, Plugin, HTTP, Command line"
        self.assertEqual(rooms, names.split(", "))
        self.assertEqual(re.findall(r"\*\*([\w -]+)\*\*", README), rooms)

    def test_script_metadata_equals_the_requirements_less_webtest(self):
        source = (HERE / "server.py").read_text("utf-8")
        script = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", source)[1]
        listed = ast.literal_eval(re.search(r"(?s)dependencies = (\[.*\])", script.replace("#", ""))[1])
        required = (HERE / "requirements.txt").read_text("utf-8").split("\n")
        self.assertEqual(listed, [line for line in required if line and not line.startswith("WebTest")])
        self.assertIn("PyJWT[crypto]>=2.15.1", listed)

    def test_nothing_else_is_visible_at_the_top_level(self):
        tracked = subprocess.run(["git", "ls-files"], cwd=HERE, capture_output=True, text=True)
        if tracked.returncode:
            self.skipTest("not a git checkout")
        visible = {path.partition("/")[0] for path in tracked.stdout.split() if not path.startswith(".")}
        five = {"server.py", "schema.sql", "test_server.py", "requirements.txt", "README.md"}
        self.assertEqual(visible, five)


def commands_of(parser, prefix=""):
    """The names of all commands, such as "user add"."""
    for action in parser._actions:
        for name, child in action.choices.items() if isinstance(action.choices, dict) else ():
            nested = list(commands_of(child, f"{prefix}{name} "))
            yield from nested or [f"{prefix}{name}"]


# --- Command line ---


class CommandLineCase(Case):
    def setUp(self):
        super().setUp()
        clean = clean_environment()
        variables = {
            "AUTH_DATABASE": self.database,
            "AUTH_KEYS": f"{self.folder}/auth.keys",
            "AUTH_PBKDF2_ITERATIONS": "1",
        }
        self.enterContext(mock.patch.dict(os.environ, clean | variables, clear=True))

    def enterContext(self, manager):  # unittest has it from Python 3.11 on
        value = manager.__enter__()
        self.addCleanup(manager.__exit__, None, None, None)
        return value

    def run_main(self, *argv, typed="", serve=lambda app, settings, announce: announce("http://here")):
        """(exit status, standard output, standard error) of one command."""
        with (
            contextlib.redirect_stdout(io.StringIO()) as output,
            contextlib.redirect_stderr(io.StringIO()) as errors,
            mock.patch("sys.stdin", io.StringIO(typed)),
        ):
            status = server.main(argv, serve)
        return status, output.getvalue(), errors.getvalue()

    def assert_fails(self, argv, status, words, **options):
        result = self.run_main(*argv, **options)
        self.assertEqual(result[:2], (status, ""), result)
        self.assertRegex(result[2], words)
        self.assertEqual(result[2].count("\n"), 1, result[2])
        self.assertNotIn(SECRET, result[2])


class CommandLineTest(CommandLineCase):
    def test_users_are_added_changed_listed_and_removed(self):
        self.assertEqual(
            self.run_main("user", "add", "alice", typed="correct horse\n"),
            (0, f"user alice added to {self.database}\n", ""),
        )
        self.assertEqual(self.run_main("user", "list")[1], "1\talice\tpbkdf2:sha256:1\t0\n")
        changed = self.run_main("user", "passwd", "alice", typed="battery staple\n")
        self.assertEqual(changed, (0, "password of alice changed, sessions ended\n", ""))
        self.assertTrue(verify_password(self.store.find_user("alice").password_hash, "battery staple"))
        self.assertEqual(self.run_main("user", "remove", "alice"), (0, "user alice removed\n", ""))
        self.assertEqual(self.run_main("user", "list"), (0, "", ""))

    def test_users_are_locked_unlocked_and_signed_out(self):
        self.add_user()
        server.create_key_file(self.folder / "auth.keys")
        for argv, printed in [
            (["user", "lock", "alice"], "user alice locked, sessions ended\n"),
            (["user", "list"], "1\talice\tlocked\t0\n"),
            (["user", "unlock", "alice"], "user alice unlocked\n"),
            (["user", "list"], "1\talice\tpbkdf2:sha256:1\t1\n"),
            (["user", "logout", "alice"], "1 sessions of alice ended\n"),
            (["user", "list"], "1\talice\tpbkdf2:sha256:1\t0\n"),
        ]:
            with self.subTest(argv):
                self.assertEqual(self.run_main(*argv), (0, printed, ""))
            if argv[1] == "unlock":
                self.sign_in.login("alice", "correct horse", time.time())

    def test_keys_are_listed_rotated_and_retired(self):
        status, printed, _ = self.run_main("key", "rotate", "--alg", "EdDSA")
        new = printed.split()[0]
        self.assertEqual((status, printed), (0, f"{new} signs now, with EdDSA, from {self.folder}/auth.keys\n"))
        old = self.run_main("key", "rotate", "--alg", "HS256")[1].split()[0]
        listed = self.run_main("key", "list")[1].split("\n")
        where = f"{self.folder}/auth.keys"
        shown = [f"{old}\tHS256\tsigns and verifies\t{where}", f"{new}\tEdDSA\tverifies\t{where}", ""]
        self.assertEqual(listed, shown)
        with mock.patch.dict(os.environ, {"AUTH_SECRET_KEY": SECRET}):
            *_, (kid, *line), _ = [line.split("\t") for line in self.run_main("key", "list")[1].split("\n")]
            self.assertEqual(line, ["HS256", "verifies", "AUTH_SECRET_KEY"])
            self.assert_fails(["key", "retire", kid], 1, "unset the variable")
        retired = f"{old} is retired, {new} signs, with EdDSA\n"
        self.assertEqual(self.run_main("key", "retire", old), (0, retired, ""))
        self.assert_fails(["key", "retire", new], 1, "is the last key; rotate first")
        self.assert_fails(["key", "retire", old], 1, "there is no key.*key list")
        self.assert_fails(["key", "rotate", "--alg", "none"], 2, "--alg.*HS256")

    def test_errors_are_one_line_that_says_what_to_do(self):
        self.run_main("user", "add", "alice", typed="correct horse\n")
        for argv, status, words, typed in [
            (["user", "add", "alice"], 1, "There is a user 'alice' already", "x\n"),
            (["user", "add", " alice"], 1, "white space", "x\n"),
            (["user", "add", "bob"], 1, "8 to 1024 characters", "\n"),
            (["user", "add", "bob"], 1, "8 to 1024 characters", ""),
            (["user", "remove", "bob"], 1, "no user 'bob'.*user list", ""),
            (["user", "passwd", "bob"], 1, "no user 'bob'.*user list", "x\n"),
            (["user"], 2, "ACTION.*--help", ""),
            (["user", "add"], 2, "NAME.*--help", ""),
            (["serve", "--colour"], 2, "there is no --colour; see .*--help", ""),
            (["paint"], 2, "COMMAND.*serve.*--help", ""),
            (["--prot", "80"], 2, "there is no --prot; did you mean --port", ""),
            (["--demo", "user", "list"], 1, "goes with no other command", ""),
            (["--demo", "--database", "sqlite:///x.db"], 1, "leave --database", ""),
            (["--host", ""], 1, "host: name an address", ""),
            (["--trusted-proxy", "proxy.local"], 1, "trusted_proxy: give the one IP address", ""),
            (["user", "list", "--database", "sqlite:////tmp/no-such-file.db"], 1, "no such file here.*--database", ""),
            (["user", "remove", "\udcff"], 1, "no user", ""),
            (["--port", "many"], 1, "port: 'many' is not a whole number", ""),
            (["--secret-key", SECRET], 2, "there is no --secret-key", ""),
            ([f"--secret-key={SECRET}"], 2, "there is no --secret-key", ""),
            (["user", "add", "bob", SECRET], 2, "unrecognized arguments", ""),
            ([SECRET], 2, "invalid choice", ""),
            (["--database", "nix://"], 1, "begins with sqlite:// or mysql://", ""),
            (["--database", "mysql://roy:hunter2@db/users"], 1, "put it into AUTH_DATABASE", ""),
            (["--demo", "--host", "0.0.0.0"], 1, "--demo listens on loopback only", ""),
            (["--database", "sqlite:////no/folder/auth.db"], 1, "unable to open", ""),
            (["--database", "sqlite:////no/folder/auth.db", "init"], 1, "unable to open", ""),
            (["init", "--database", "mysql://roy@127.0.0.1:1/users"], 1, "refused", ""),
            (["--keys", "/no/folder/auth.keys"], 1, "cannot be written.*--keys", ""),
        ]:
            with self.subTest(argv):
                self.assert_fails(argv, status, words, typed=typed)

    def test_an_unknown_variable_is_an_error(self):
        with mock.patch.dict(os.environ, {"AUTH_PROT": "80"}):
            self.assert_fails([], 1, "AUTH_PROT is no setting; did you mean AUTH_PORT?")

    def test_two_users_of_one_name_are_named_by_the_commands(self):
        self.raw_sql("CREATE TABLE user (id INTEGER PRIMARY KEY, username TEXT, password TEXT)")
        self.raw_sql("INSERT INTO user (username) VALUES ('roy'), ('roy')")
        for action in ["add", "passwd", "remove"]:
            self.assert_fails(["user", action, "roy"], 1, r"2 users are named 'roy' \(ids 1, 2\)", typed="x\n")
        self.assertEqual(self.run_main("user", "list")[1], "1\troy\tno usable hash\t0\n2\troy\tno usable hash\t0\n")

    def test_a_password_is_asked_for_twice_at_a_terminal(self):
        with mock.patch.object(getpass, "getpass", side_effect=["one", "two"]), mock.patch("sys.stdin") as terminal:
            terminal.isatty.return_value = True
            with self.assertRaisesRegex(server.BadRequest, "differ"):
                server.new_password()

    def test_init_makes_the_tables(self):
        self.assertEqual(self.run_main("init"), (0, f"tables are ready in {self.database}\n", ""))
        self.assertEqual(self.raw_sql("SELECT COUNT(*) FROM user"), [(0,)])

    def test_the_start_says_where_things_are(self):
        banner = f"rest-auth {server.__version__} on http://here, users in {self.database}, keys in "
        self.assertEqual(self.run_main(), (0, f"{banner}{self.folder}/auth.keys\n", ""))
        with mock.patch.dict(os.environ, {"AUTH_SECRET_KEY": SECRET}):
            self.assertEqual(self.run_main("serve"), (0, f"{banner}AUTH_SECRET_KEY\n", ""))

    def test_version(self):
        self.assertEqual(self.run_main("--version"), (0, f"rest-auth {server.__version__}\n", ""))


class ServiceTest(Case):
    """`python server.py` as a process, through real sockets."""

    def test_demo_serves_roy_and_leaves_nothing_behind(self):
        with Service(self.folder, "--demo") as service:
            token = service.login("roy", "roy")
            status, _, text = service.request("GET", "/auth/me", Authorization=f"Bearer {token}")
            self.assertEqual((status, json.loads(text)["username"]), (200, "roy"))
        self.assertEqual(service.process.returncode, 0)
        self.assertEqual([path.name for path in self.folder.iterdir()], ["errors"])

    def test_ctrl_c_and_sigterm_end_it_cleanly(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            with Service(self.folder, "--demo") as service:
                self.assertEqual(service.stop(number), 0)
            self.assertEqual(service.log, "")

    def test_no_secret_token_or_password_in_ps_or_the_log(self):
        environment = {"AUTH_SECRET_KEY": SECRET, "AUTH_DATABASE": f"sqlite:///{self.folder}/auth.db"}
        if mariadb:
            name = self.new_database()
            mariadb.run("CREATE OR REPLACE USER roy@localhost IDENTIFIED BY 'hunter2'")
            mariadb.run(f"GRANT ALL ON {name}.* TO roy@localhost")
            environment["AUTH_DATABASE"] = mariadb.url(name, "roy", "hunter2")
        add = [sys.executable, HERE / "server.py", "user", "add", "alice"]
        subprocess.run(add, input="correct horse\n", text=True, check=True, env=os.environ | environment, stdout=-3)
        with Service(self.folder, **environment) as service:
            token = service.login("alice", "correct horse")
            service.login("alice", "wrong horse")
            service.request("GET", "/auth/me", Authorization=f"Bearer {token}")
            service.request("GET", "/auth/me", Authorization=f"Bearer {token}x")
            listed = subprocess.run(["ps", "-ww", "-o", "args", "-p", str(service.process.pid)], capture_output=True)
            self.assertIn(b"server.py", listed.stdout)
        for secret in [SECRET, "hunter2", "correct horse", "wrong horse", token, token.rpartition(".")[2], "pbkdf2"]:
            self.assertNotIn(secret, listed.stdout.decode() + service.log + service.banner)

    def test_signed_out_at_one_process_is_signed_out_at_the_other(self):
        for database in self.on_each_database():
            environment = {"AUTH_DATABASE": database, "AUTH_KEYS": f"{self.folder}/shared.keys"}
            add = [sys.executable, HERE / "server.py", "user", "add", "alice"]
            subprocess.run(add, input="correct horse\n", text=True, check=True, env=os.environ | environment, stdout=-3)
            with (
                Service(self.folder, **environment) as one,
                Service(self.folder, **environment) as other,
                self.subTest(database),
            ):
                for end, path in [("POST", "/auth/logout"), ("DELETE", "/auth/sessions/")]:
                    bearer = {"Authorization": f"Bearer {one.login('alice', 'correct horse')}"}
                    self.assertEqual(one.request("GET", "/rest-auth", **bearer)[0], 200)
                    me = json.loads(other.request("GET", "/auth/me", **bearer)[2])
                    self.assertEqual(
                        other.request(end, path + me["session"]["id"] * path.endswith("/"), **bearer)[0], 204
                    )
                    status, _, text = one.request("GET", "/rest-auth", **bearer)
                    self.assertEqual((status, json.loads(text)["description"]), (401, "Session has ended"))

    def test_keys_rotate_under_a_client_without_a_failed_request(self):
        rotate = [sys.executable, HERE / "server.py", "key", "rotate"]
        environment = {"AUTH_DATABASE": f"sqlite:///{self.folder}/auth.db", "AUTH_KEYS": f"{self.folder}/auth.keys"}
        self.settings = dataclasses.replace(self.settings, database=environment["AUTH_DATABASE"])
        self.add_user()
        with Service(self.folder, **environment) as one, Service(self.folder, **environment) as other:
            form = {"username": "alice", "password": "correct horse"}
            tokens = json.loads(one.request("POST", "/auth", urllib.parse.urlencode(form), **FORM)[2])
            signed_by = []

            def call(service):
                nonlocal tokens
                status, _, text = service.request("GET", "/rest-auth", Authorization=f"Bearer {tokens['access_token']}")
                self.assertEqual(status, 200, text)
                body = urllib.parse.urlencode({"refresh_token": tokens["refresh_token"]})
                status, _, text = service.request("POST", "/auth/refresh", body, **FORM)
                self.assertEqual(status, 200, text)
                tokens = json.loads(text)
                signed_by.append(jwt.get_unverified_header(tokens["access_token"])["alg"])
                return signed_by[-1]

            for algorithm in ["EdDSA", "RS256"]:
                changing = subprocess.Popen([*rotate, "--alg", algorithm], env=os.environ | environment, stdout=-3)
                while changing.poll() is None:
                    call(one), call(other)
                since = time.monotonic()
                while not call(one) == call(other) == algorithm:
                    self.assertLess(time.monotonic() - since, 2)
                self.assertEqual(changing.returncode, 0)
            published = json.loads(one.request("GET", "/.well-known/jwks.json")[2])
            key = jwt.PyJWKSet.from_dict(published)[jwt.get_unverified_header(tokens["access_token"])["kid"]]
            self.assertEqual(jwt.decode(tokens["access_token"], key, algorithms=["RS256"])["identity"], 1)
        self.assertEqual(set(signed_by), {"HS256", "EdDSA", "RS256"})

    def test_a_key_made_by_the_service_outlives_it(self):
        for _ in range(2):
            with Service(self.folder) as service:
                self.assertIn("keys in auth.keys", service.banner)
            made = (self.folder / "auth.keys").read_text()
            self.assertEqual(stat.S_IMODE((self.folder / "auth.keys").stat().st_mode), 0o600)
        self.assertEqual((self.folder / "auth.keys").read_text(), made)

    def test_a_port_in_use_is_one_line(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = str(listener.getsockname()[1])
            command = [sys.executable, HERE / "server.py", "--demo", "--port", port]
            done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder)
        self.assertEqual((done.returncode, done.stdout), (1, ""))
        self.assertRegex(done.stderr, rf"^server.py: 127.0.0.1 port {port}: Address already in use.*--port\n$")

    def test_ipv6(self):
        with socket.socket(socket.AF_INET6) as probe:
            try:
                probe.bind(("::1", 0))
            except OSError:
                self.skipTest("no IPv6 here")
        with Service(self.folder, "--demo", "--host", "::1") as service:
            self.assertEqual(service.request("GET", "/health")[0], 200)

    def test_what_waitress_refuses_is_json_and_names_no_server(self):
        with Service(self.folder, "--demo") as service:
            for data, status in [
                (b"GET /health HTTP/1.1\r\nHost: a\r\nX : y\r\n\r\n", 400),
                (b"GET /health HTTP/1.1\r\nHost: a\r\nX: ".ljust(16 * 1024, b"y"), 431),
                (b"POST /auth HTTP/1.1\r\nHost: a\r\nContent-Length: 9999999\r\n\r\n", 413),
                (b"POST /auth HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: zip\r\n\r\n", 501),
            ]:
                with self.subTest(data[:70]):
                    head, _, body = service.raw(data).partition(b"\r\n\r\n")
                    self.assertIn(f" {status} ".encode(), head)
                    self.assertEqual(json.loads(body)["status_code"], status)
                    self.assertNotRegex(head + body, rb"(?i)waitress|server:|python|bottle")
            self.assertEqual(service.request("GET", "/health")[0], 200)

    def test_a_forwarded_header_that_is_malformed_is_json_too(self):
        with Service(self.folder, "--demo", "--trusted-proxy", "127.0.0.1") as service:
            for headers in [
                {"X_Forwarded_Proto": "https,http"},
                {"X_Forwarded_Proto": "ftp"},
                {"X_Forwarded_For": '"a'},
            ]:
                status, _, text = service.request("GET", "/health", **headers)
                self.assertEqual((status, json.loads(text)["status_code"]), (400, 400))

    def test_few_descriptors_are_refused_at_the_start(self):
        command = f"ulimit -n 90; exec {sys.executable} {HERE / 'server.py'} --demo --port 0"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=self.folder)
        self.assertEqual((done.returncode, done.stderr.count("\n")), (1, 1), done.stderr)
        self.assertIn("raise ulimit -n", done.stderr)

    def test_a_reader_that_has_enough_ends_a_list_quietly(self):
        database = f"sqlite:///{self.folder}/auth.db"
        for number in range(3):
            self.add_user(f"user{number}" * 20)
        command = f"{sys.executable} {HERE / 'server.py'} user list --database {database} | true"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stderr), (0, ""))

    def test_chunked_and_large_bodies(self):
        with Service(self.folder, "--demo") as service:
            body = b'{"username": "roy", "password": "roy"}'
            head = b"POST /auth HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/json\r\n"
            chunked = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
            self.assertIn(b"access_token", service.raw(head + chunked))
            status, _, text = service.request("POST", "/auth", b"x" * 1_000_000, Content_Type="application/json")
            self.assertEqual((status, json.loads(text)["status_code"]), (413, 413))
            self.assertIsInstance(service.login("roy", "roy"), str)

    def test_requests_that_wait_are_not_logged_each(self):
        with (
            Service(self.folder, "--demo", "--threads", "1", AUTH_PBKDF2_ITERATIONS="20000") as service,
            concurrent.futures.ThreadPoolExecutor(16) as pool,
        ):
            self.assertEqual({type(token) for token in pool.map(service.login, ["roy"] * 48, ["roy"] * 48)}, {str})
        self.assertEqual({json.loads(line)["event"] for line in service.log.splitlines()}, {"login"})


class ExportTest(CommandLineCase):
    HASHES = [vector for vector, _ in PasswordsTest.VECTORS[:4]]

    def export(self):
        status, lines, errors = self.run_main("user", "export")
        self.assertEqual((status, errors), (0, ""))
        return lines

    def into(self, database, lines, *arguments):
        with mock.patch.dict(os.environ, {"AUTH_DATABASE": database}):
            return self.run_main("user", "import", *arguments, typed=lines)

    def test_what_is_exported_is_imported_elsewhere(self):
        names = ["alice", "Ærøskøbing", "日本語😀", 'a"b\\c', *(f"user{number}" for number in range(1000))]
        for number, name in enumerate(names):
            lock = server.LOCKED if number == 1 else ""
            self.store.add_user(name, lock + self.HASHES[number % len(self.HASHES)])
        lines = self.export()
        self.assertEqual(json.loads(lines.splitlines()[0]), {"username": "alice", "password_hash": self.HASHES[0]})
        for database in self.on_each_database():
            with self.subTest(database):
                where = server.parse_database(database)
                self.assertEqual(self.into(database, lines), (0, f"1004 users imported into {where}\n", ""))
                with mock.patch.dict(os.environ, {"AUTH_DATABASE": database}):
                    self.assertEqual(self.export(), lines)

    def test_names_that_are_there_refuse_the_import_or_are_left_out(self):
        self.store.add_user("alice", self.HASHES[0])
        line = '{"username": "%s", "password_hash": "%s"}\n'
        lines = line % ("bob", self.HASHES[0]) + line % ("alice", self.HASHES[1])
        status, _, errors = self.into(self.database, lines)
        self.assertEqual(status, 1)
        self.assertIn("'alice' already, or twice in the file; nothing was imported", errors)
        self.assertEqual(len(self.store.list_users()), 1)
        expected = f"1 users imported into {self.database}, 1 left out, whose names were there\n"
        self.assertEqual(self.into(self.database, lines, "--skip-existing"), (0, expected, ""))
        self.assertEqual(self.store.find_user("alice").password_hash, self.HASHES[0])
        self.assertEqual(self.into(self.database, line % ("eve", self.HASHES[0]) * 2)[0], 1)
        self.assertIsNone(self.store.find_user("eve"))

    def test_a_line_that_is_wrong_refuses_the_import(self):
        good = json.dumps({"username": "bob", "password_hash": self.HASHES[0]})
        for line, words in [
            ("bob", 'Line 2 is not {"username": …, "password_hash": …}'),
            ('["bob"]', "Line 2 is not"),
            ('{"username": "bob"}', "Line 2 is not"),
            ("[" * 100_000, "Line 2 is not"),
            (good.replace('"bob"', "1"), "Line 2: a user name is"),
            (good.replace('"bob"', '""'), "Line 2: a user name is"),
            (good.replace('"bob"', '"\\ud800"'), "Line 2: a user name is"),
            ('{"username": "bob", "password_hash": "hunter2"}', "Line 2: 'bob' has no hash"),
            ('{"username": "bob", "password_hash": null}', "Line 2: 'bob' has no hash"),
        ]:
            with self.subTest(line[:40]):
                status, output, errors = self.into(self.database, f"{good}\n{line}\n")
                self.assertEqual((status, output), (1, ""))
                self.assertIn(words, errors)
                self.assertIn("nothing was imported", errors)
                self.assertNotIn("hunter2", errors)
                self.assertEqual(self.store.list_users(), [])

    def test_an_export_that_failed_is_no_import_of_nobody(self):
        self.assert_fails(["user", "import"], 1, "Standard input holds no users; nothing was imported", typed="\n")

    def test_progress_is_shown_on_a_terminal(self):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        lines = "".join(
            json.dumps({"username": f"user{number}", "password_hash": self.HASHES[0]}) + "\n" for number in range(900)
        )
        with (
            mock.patch("sys.stdin", io.StringIO(lines)),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(Terminal()) as errors,
        ):
            self.assertEqual(server.main(["user", "import"]), 0)
        self.assertEqual(errors.getvalue(), "\r400 of 900\r800 of 900\r900 of 900\n")


class DoctorTest(CommandLineCase):
    """doctor says what is wrong, and how to mend it."""

    def setUp(self):
        super().setUp()
        server.create_key_file(self.folder / "auth.keys")
        self.store.prepare()

    def doctor(self, *argv):
        if "--pbkdf2-iterations" not in argv:
            argv = [*argv, "--pbkdf2-iterations", "600000"]
        status, printed, errors = self.run_main("doctor", *argv)
        self.assertEqual(errors, "")
        self.assertEqual(status, 0 if printed.startswith("all is well") else 1)
        return printed.splitlines()

    def test_good_news_is_one_line(self):
        self.store.add_user("alice", server.hash_password("correct horse"))
        self.assertEqual(self.doctor(), [f"all is well with {self.database}"])

    def test_each_fault_is_named_with_its_remedy(self):
        for number, (name, stored) in enumerate(
            [("weak", server.hash_password("x", 1)), ("plain", "roy"), (None, "x"), ("twin", "x"), ("twin", "!x")], 1
        ):
            self.raw_sql("DROP TABLE IF EXISTS user_old")
            if number == 1:
                self.raw_sql("DROP TABLE user")
                self.raw_sql("CREATE TABLE user (id INTEGER PRIMARY KEY, username TEXT, password TEXT)")
            self.raw_sql("INSERT INTO user (username, password) VALUES (%s, %s)", name, stored)
        (self.folder / "auth.keys").chmod(0o644)
        (self.folder / "auth.db").chmod(0o644)
        self.store.note_forwarder("192.0.2.9", int(time.time()))
        found = self.doctor("--pbkdf2-iterations", "600000", "--host", "0.0.0.0")
        for words in [
            "auth.keys: open to others.*chmod 600",
            "auth.db: open to others.*chmod 600",
            "host 0.0.0.0 is open.*AUTH_TRUSTED_PROXY",
            "X-Forwarded-For came from 192.0.2.9.*AUTH_TRUSTED_PROXY",
            "1 of 5 users have hashes below pbkdf2_iterations",
            r"user 2 \('plain'\) has no usable hash; run: server.py user passwd",
            "user 3 has no name",
            r"user 4 is one of 2 named 'twin'; rename",
            r"user 5 is one of 2 named 'twin'; rename",
        ]:
            with self.subTest(words):
                self.assertRegex("\n".join(found), words)
        self.assertEqual(len(found), 9 + 2)  # and the hashes of users 3 and 4

    def test_a_key_that_only_another_host_has(self):
        self.store.add_user("alice", server.hash_password("correct horse"))
        there = dataclasses.replace(self.settings, secret_key="", keys=str(self.folder / "there.keys"))
        with contextlib.closing(server.open_sign_in(there)) as other:
            other.login("alice", "correct horse", time.time())
            [line] = self.doctor()
            self.assertRegex(line, "^key .* signed in the last hour and is not here; copy the key file")
            shutil.copy(there.keys, self.folder / "auth.keys")
        self.assertEqual(self.doctor(), [f"all is well with {self.database}"])

    def test_weak_settings(self):
        found = self.doctor("--pbkdf2-iterations", "1", "--throttle-pair", "0", "--throttle-name", "0")
        self.assertEqual([line.split()[0] for line in found], ["pbkdf2_iterations", "throttle_pair", "throttle_name"])
        self.store.note_forwarder("192.0.2.9", int(time.time()))
        self.assertEqual(self.doctor("--trusted-proxy", "192.0.2.9"), [f"all is well with {self.database}"])

    def test_missing_tables_and_no_database(self):
        self.raw_sql("DROP TABLE auth_session")
        self.assertRegex(self.doctor()[0], "no table auth_session; run: server.py init")
        [line] = self.doctor("--database", "mysql://roy@127.0.0.1:1/users")
        self.assertRegex(line, "refused.*AUTH_DATABASE")

    def test_a_clock_that_differs(self):
        with mock.patch.object(server.SQLiteStore, "clock", lambda store: time.time() + 60):
            self.assertRegex(self.doctor()[0], r"its clock is \+60 s")

    def test_a_weak_secret_is_named_like_everywhere(self):
        with mock.patch.dict(os.environ, {"AUTH_SECRET_KEY": "secret-key"}):
            self.assert_fails(["doctor"], 1, "published.*secrets.token_urlsafe")


class MySQLDoctorTest(MySQLCase):
    def test_each_host_is_looked_at(self):
        dead = free_port()
        self.database = self.database.replace("/t", f",127.0.0.1:{dead}/t")
        [problem] = self.store.failing_hosts()
        self.assertRegex(problem, f"^127.0.0.1:{dead}: .*refused")

    def test_the_servers_clock_and_the_way_to_it(self):
        self.assertAlmostEqual(self.store.clock(), time.time(), delta=5)
        self.assertTrue(self.store.is_private())
        with mock.patch("server.is_loopback", lambda host: False):
            self.assertTrue(self.store.is_private())  # this server offers TLS, so it is used


class ProcessesTest(Case):
    """Several processes, and what others start the service with."""

    def children(self, service):
        """The process ids of the service's children."""
        path = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children")
        return {int(pid) for pid in path.read_text().split()}

    def test_each_of_several_processes_serves_and_sees_the_others_sign_outs(self):
        for database in self.on_each_database():
            self.settings = dataclasses.replace(self.settings, database=database)
            self.sign_in = server.open_sign_in(self.settings)
            self.addCleanup(self.sign_in.close)
            self.add_user()
            with self.subTest(database), Service(self.folder, "--processes", "2", AUTH_DATABASE=database) as service:
                for _ in range(5):
                    bearer = {"Authorization": f"Bearer {service.login('alice', 'correct horse')}"}
                    self.assertEqual({service.request("GET", "/rest-auth", **bearer)[0] for _ in range(10)}, {200})
                    self.assertEqual(service.request("POST", "/auth/logout", **bearer)[0], 204)
                    self.assertEqual({service.request("GET", "/rest-auth", **bearer)[0] for _ in range(10)}, {401})

    def test_a_killed_child_is_replaced_and_no_request_to_the_others_fails(self):
        self.add_user()
        with Service(self.folder, "--processes", "3", AUTH_DATABASE=self.database) as service:
            bearer = {"Authorization": f"Bearer {service.login('alice', 'correct horse')}"}
            before = wait_for(lambda: len(self.children(service)) == 3 and self.children(service))
            for pid in list(before)[:2]:
                os.kill(pid, signal.SIGKILL)
                answers = [service.request("GET", "/rest-auth", **bearer)[0] for _ in range(20)]
                self.assertEqual(set(answers), {200})
                wait_for(lambda pid=pid: len(self.children(service) - {pid}) == 3)
            self.assertEqual(len(before & self.children(service)), 1)
        died = [json.loads(line) for line in service.log.splitlines() if "process_died" in line]
        self.assertEqual([event["status"] for event in died], [signal.SIGKILL] * 2)

    def test_others_may_open_the_database_while_it_serves(self):
        self.add_user()
        source = "import sqlite3, sys\nfor _ in range(300):\n c = sqlite3.connect(sys.argv[1])\n c.execute('SELECT COUNT(*) FROM user').fetchall()\n c.close()"
        with Service(self.folder, "--processes", "2", AUTH_DATABASE=self.database) as service:
            children = wait_for(lambda: len(self.children(service)) == 2 and self.children(service))
            bearer = {"Authorization": f"Bearer {service.login('alice', 'correct horse')}"}
            with subprocess.Popen([sys.executable, "-c", source, self.folder / "auth.db"]) as outsider:
                while outsider.poll() is None:
                    self.assertEqual(service.request("GET", "/rest-auth", **bearer)[0], 200)
                    self.assertIsInstance(service.login("alice", "correct horse"), str)
            self.assertEqual(outsider.returncode, 0)
            self.assertEqual(self.children(service), children)
        self.assertNotIn("process_died", service.log)

    def test_a_signal_at_any_moment_of_the_start_ends_all(self):
        self.store.prepare()
        for number in range(8):
            with Service(self.folder, "--processes", "4", AUTH_DATABASE=self.database) as service:
                time.sleep(number / 1000)  # not for time to pass, but for a signal at another moment
                self.assertEqual(service.stop(signal.SIGTERM), 0)

    def test_signals_end_all_of_them_and_so_does_a_parent_that_is_killed(self):
        self.store.prepare()
        for number, status in [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, -signal.SIGKILL)]:
            with Service(self.folder, "--processes", "2", AUTH_DATABASE=self.database) as service, self.subTest(number):
                children = wait_for(lambda service=service: len(self.children(service)) == 2 and self.children(service))
                self.assertEqual(service.stop(number), status)
                for pid in children:
                    wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists())

    def get(self, address, path="/health"):
        """The status of a request to a TCP or unix address."""
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        with socket.socket(family) as connection:
            connection.settimeout(30)
            connection.connect(address)
            connection.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            return int(connection.recv(65536).split()[1])

    def test_a_unix_socket_replaces_a_stale_one_and_not_a_live_one(self):
        path = str(self.folder / "socket")
        command = [sys.executable, HERE / "server.py", "--demo", "--host", path]
        for number in (signal.SIGKILL, signal.SIGTERM):
            with subprocess.Popen(command, cwd=self.folder, stdout=subprocess.PIPE, stderr=-3, text=True) as process:
                self.assertIn(f"on unix:{path},", process.stdout.readline())
                self.assertEqual(self.get(path), 200)
                self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o660)
                second = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
                self.assertRegex(second.stderr, "Address already in use.*--host")
                self.assertEqual(self.get(path), 200)
                process.send_signal(number)

    def test_a_socket_that_systemd_passes_on(self):
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            Service(self.folder, "--demo", listener=listener) as service,
        ):
            self.assertEqual(service.address, listener.getsockname())
            self.assertEqual(self.get(listener.getsockname()), 200)

    def test_gunicorn(self):
        packages = self.folder / "packages"
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", packages, "gunicorn"]
        subprocess.run(command, check=True, capture_output=True)
        self.add_user()
        environment = clean_environment()
        environment |= {
            "AUTH_DATABASE": self.database,
            "AUTH_KEYS": f"{self.folder}/auth.keys",
            "AUTH_TRUSTED_PROXY": "127.0.0.1",
            "PYTHONPATH": f"{packages}:{HERE}",
        }
        port = free_port()
        arguments = ["-w", "2", "-k", "gthread", "--threads", "4", "-b", f"127.0.0.1:{port}", "server:app"]
        command = [sys.executable, "-m", "gunicorn", *arguments]
        with subprocess.Popen(command, cwd=self.folder, env=environment, stdout=-3, stderr=-3) as process:

            def answers():
                with contextlib.suppress(OSError):
                    return self.get(("127.0.0.1", port)) == 200

            wait_for(answers)
            self.assertEqual(self.get(("127.0.0.1", port), "/rest-auth"), 401)
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            with contextlib.closing(connection):
                headers = {"Content-Type": BadInputTest.FORM, "X-Forwarded-For": "203.0.113.7, [2001:db8::7]:4711"}
                connection.request("POST", "/auth", "username=alice&password=correct+horse", headers)
                self.assertEqual(connection.getresponse().status, 200)
            process.terminate()
        [session] = self.store.list_sessions(1, time.time())
        self.assertEqual(session.address, "2001:db8::7")  # the nearest, which the proxy itself has seen

    def test_only_the_app_is_made_on_demand(self):
        with self.assertRaises(AttributeError):
            getattr(server, "application")  # noqa: B009


class AttackTest(Case):
    """Hostile requests through a real socket; after each, a good sign-in still works."""

    def request_line(self, *lines, body=b""):
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body

    def shapes(self, token):
        """(bytes, what may come back: a set of statuses, 0 for nothing)"""
        form = "Content-Type: application/x-www-form-urlencoded"
        login = b"username=roy&password=roy"
        size = f"Content-Length: {len(login)}"
        post, get, host = "POST /auth HTTP/1.1", "GET /rest-auth HTTP/1.1", "Host: a"
        smuggled = b"GET /rest-auth HTTP/1.1\r\nHost: a\r\n\r\n"
        chunks = b"5\r\nusern\r\n0\r\n\r\n"
        yield self.request_line(post, host, form, size, f"Content-Length: {len(login) + 1}", body=login), {400}
        yield self.request_line(post, host, form, size, size, body=login), {400}
        yield self.request_line(post, host, form, "Content-Length: 5, 5", body=login), {400}
        for length in ["-1", "+5", "0x5", "1e1", "5 5", "\xb2", "9" * 5000, "", " "]:
            yield (
                self.request_line(post, host, form, f"Content-Length: {length}", body=login).replace(b"?", b"\xd9"),
                {400, 401},
            )
        yield self.request_line(post, host, form, size, "Transfer-Encoding: chunked", body=chunks + smuggled), {400}
        yield self.request_line(post, host, form, "Transfer-Encoding: chunked", "Content-Length: 5", body=chunks), {400}
        yield (
            self.request_line("POST /auth HTTP/1.0", form, "Transfer-Encoding: chunked", body=chunks + smuggled),
            {400},
        )
        for encoding in ["xchunked", "chunked, identity", "identity, chunked", "gzip", "chunked\x0b", "\x00chunked"]:
            yield self.request_line(post, host, form, f"Transfer-Encoding: {encoding}", body=chunks), {400, 501}
        yield self.request_line(post, host, form, "Transfer-Encoding : chunked", body=chunks), {400}
        yield self.request_line(post, host, form, "Content-Length : 5", body=login), {400}
        yield self.request_line(post, host, form, "Transfer-Encoding: chunked", body=b"zz\r\nusern\r\n0\r\n\r\n"), {400}
        yield self.request_line(post, host, form, "Transfer-Encoding: chunked", body=b"5\nusern\n0\n\n"), {400, 0}
        for encoding in ["", ",", "chunked, chunked", "chunked,"]:
            yield self.request_line(post, host, form, f"Transfer-Encoding: {encoding}", size, body=login), {400}
        yield self.request_line(post, host, form, "Transfer_Encoding: chunked", size, body=login), {400}
        yield self.request_line(post, host, "Host: b", form, size, body=login), {400}
        yield self.request_line(post, form, size, body=login), {400}
        yield self.request_line("GET /health HTTP/9.9", host), {400}
        yield (
            self.request_line(post, host, form, size, "X-Forwarded-For: \xff", body=b"username=roy&password=xxx"),
            {401},
        )
        yield self.request_line("GET /.well-known/jwks.json HTTP/1.1", host, "If-None-Match: \xff"), {200}
        yield self.request_line(get, host, " folded: x"), {400, 401}
        yield self.request_line(get, host, "X: a\nY: b"), {400}
        yield b"GET /rest-auth HTTP/1.1\nHost: a\n\n", {400, 0}
        yield self.request_line(get, host, "X: a\x00b"), {400, 401}
        yield self.request_line(get, host, ": empty"), {400}
        yield self.request_line(get, host, "A" * 20_000 + ": b"), {431, 0}
        yield self.request_line("GET /" + "a" * 20_000 + " HTTP/1.1", host), {431, 0}
        for line in [
            "GET http://[::1/health HTTP/1.1",
            "GET",
            "",
            "GET  /  HTTP/1.1",
            "\x16\x03\x01\x02",
            "GET / HTTP/9.9",
            "GET /",
        ]:
            yield self.request_line(line, host), {400, 401, 404, 0}
        for path in [
            "/../auth.keys",
            "//etc/passwd",
            "/%2e%2e/auth.keys",
            "/auth%00",
            "/%",
            "/\xff",
            "/rest-auth;x",
            "*",
            "/rest-auth/",
        ]:
            yield self.request_line(f"GET {path} HTTP/1.1", host), {400, 404, 401, 405}
        for method in ["TRACE", "CONNECT", "PROXY", "get", "HEAD ", "\x00", "PROPFIND", "ANY"]:
            yield self.request_line(f"{method} /rest-auth HTTP/1.1", host), {400, 401, 405}
        for header in [f"Authorization: JWT {token}", f"authorization:Bearer {token}"]:
            yield self.request_line(get, host, header, header), {401}
        yield self.request_line(get, host, "Authorization: " + "A" * 10_000), {401}
        yield self.request_line(get, host, "Authorization: Bearer \xff\xfe\x80"), {401}
        yield self.request_line(get, host, f"Cookie: access_token={token}"), {401}
        yield self.request_line(f"GET /rest-auth?access_token={token} HTTP/1.1", host), {401}
        yield self.request_line(get, host, f"X_Authorization: JWT {token}"), {401}
        yield self.request_line(get, host, f"Authorization_: JWT {token}"), {401}
        yield self.request_line(get, host, "Expect: 100-continue", "X-HTTP-Method-Override: OPTIONS"), {100, 401}

    def forgeries(self, token):
        """Tokens after RFC 8725 and what was found since."""
        head, claims, signature = token.split(".")
        header = json.loads(base64.urlsafe_b64decode(head + "==="))
        payload = json.loads(base64.urlsafe_b64decode(claims + "==="))

        def forge(changes, key=b"", payload=payload):
            changed = {name: value for name, value in (header | changes).items() if value is not ...}
            parts = ".".join(server.base64url(json.dumps(part).encode()) for part in (changed, payload))
            return f"{parts}.{server.base64url(hmac.digest(key, parts.encode(), 'sha256')) if key else ''}"

        for none in [
            "none",
            "None",
            "NONE",
            "nOnE",
            "",
            None,
            ...,
            "HS384",
            "RS256",
            "ES256",
            "EdDSA",
            "hs256",
            ["HS256"],
            0,
        ]:
            yield forge({"alg": none})
            yield forge({"alg": none}) + signature
            yield forge({"alg": none}, b"x" * 32)
        yield f"{head}.{claims}."
        yield f"{head}.{claims}"
        yield f"{head}..{signature}"
        yield f".{claims}.{signature}"
        yield f"{head}.{claims}.{signature}.{signature}"
        yield f"{head}.{claims}.{server.base64url(b'0' * 32)}"
        yield f"{head}.{claims}.{signature[:-1]}"
        yield f"{head}.{claims}.{signature}=="
        for kid in [
            "../../../../dev/null",
            "/dev/null",
            "' UNION SELECT 'x",
            "\x00",
            "| id",
            "x" * 5000,
            "",
            5,
            [header["kid"]],
            {},
        ]:
            for key in [b"", b"\x00", b"x", b"' UNION SELECT 'x"]:
                yield forge({"kid": kid}, key)
        own = {"kty": "oct", "k": server.base64url(b"x" * 32), "alg": "HS256", "kid": "mine"}
        for name, value in [
            ("jku", "http://127.0.0.1:1/jwks.json"),
            ("jwk", own),
            ("x5u", "http://127.0.0.1:1/cert.pem"),
            ("x5c", ["MIIB"]),
            ("crit", ["exp"]),
            ("crit", []),
            ("crit", "exp"),
            ("b64", False),
            ("zip", "DEF"),
            ("cty", "JWT"),
            ("enc", "A256GCM"),
        ]:
            for kid in [header["kid"], "mine", ...]:
                yield forge({name: value, "kid": kid}, b"x" * 32)
                yield forge({name: value, "kid": kid, "alg": "none"})
        for change in [{"identity": 2}, {"sub": "2"}, {"exp": 2**40}, {"sid": "A" * 22}, {"identity": payload["sub"]}]:
            yield f"{head}.{server.base64url(json.dumps(payload | change).encode())}.{signature}"

    def test_after_each_attack_a_good_sign_in_still_works(self):
        with Service(
            self.folder, "--demo", "--throttle-address", "0", "--throttle-pair", "0", "--throttle-name", "0"
        ) as service:
            token = service.login("roy", "roy")
            for data, statuses in self.shapes(token):
                with self.subTest(data[:90]):
                    answer = service.raw(data)
                    found = re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer)
                    self.assertIn(int(found[0]) if found else 0, statuses, answer[:300])
                    self.assertNotRegex(
                        answer, rb"(?i)traceback|waitress|bottle|python|access_token|authenticate person"
                    )
                    self.assertIsInstance(service.login("roy", "roy"), str)
            for forged in self.forgeries(token):
                with self.subTest(forged[:90]):
                    status, headers, text = service.request("GET", "/rest-auth", Authorization=f"Bearer {forged}")
                    self.assertIn(status, (401, 431), text)
                    self.assertEqual(json.loads(text)["status_code"], status)
                    self.assertIsInstance(service.login("roy", "roy"), str)
            self.assertEqual(service.request("GET", "/rest-auth", Authorization=f"Bearer {token}")[0], 200)
        self.assertNotIn("Traceback", service.log)
        self.assertNotIn("exception", service.log)

    def test_security_headers(self):
        with Service(self.folder, "--demo") as service:
            for path in ["/health", "/rest-auth", "/nowhere"]:
                headers = service.request("GET", path)[1]
                self.assertEqual((headers["X-Content-Type-Options"], headers["Cache-Control"]), ("nosniff", "no-store"))
                self.assertIsNone(headers["Server"])

    def test_idle_and_trickling_connections_keep_nobody_out(self):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and hard < 2000:
            self.skipTest("too few descriptors")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        with Service(self.folder, "--demo") as service, contextlib.ExitStack() as stack:
            connections = [stack.enter_context(socket.create_connection(service.address)) for _ in range(1200)]
            for step in range(3):
                for trickling in connections[:200]:
                    trickling.sendall(b"GET /rest-auth"[step : step + 1])
                self.assertIsInstance(service.login("roy", "roy"), str)
                self.assertEqual(service.request("GET", "/health")[0], 200)

    def test_a_request_that_never_ends_is_cut_off(self):
        adjustments = waitress.adjustments.Adjustments()
        for received in [b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"]:
            parser = server.StrictParser(adjustments)
            parser.received(received)
            self.assertFalse(parser.completed)
            parser._begun -= server.REQUEST_TIMEOUT + 1
            parser.received(b"x")
            self.assertEqual((parser.completed, parser.error.code), (True, 408))

    def test_a_proxy_that_is_not_trusted_is_noted_and_not_believed(self):
        with Service(self.folder) as service:
            for number in range(6):
                form, forged = urllib.parse.urlencode(locals_of("roy", "x")), f"203.0.113.{number}"
                status = service.request("POST", "/auth", form, **FORM, X_Forwarded_For=forged)[0]
            self.assertEqual(status, 429)
        noted = [json.loads(line) for line in service.log.splitlines() if "untrusted" in line]
        self.assertEqual([line["address"] for line in noted], ["127.0.0.1"])
        with Service(self.folder, "--trusted-proxy", "127.0.0.1") as service:
            form = urllib.parse.urlencode(locals_of("ann", "x"))
            for network in ["::ffff:203.0.113.{}", "[2001:db8:{}::1]:443", "2001:db8:9{}::1"]:
                for number in range(6):
                    forged = {"X_Forwarded_For": network.format(number)}
                    self.assertEqual(service.request("POST", "/auth", form, **FORM, **forged)[0], 401)
            for number in range(7):
                forged = {"X_Forwarded_For": f"[2001:db8:a:b::{number}]:44{number}"}
                status = service.request("POST", "/auth", form, **FORM, **forged)[0]
            self.assertEqual(status, 429)
            for number in range(6):
                form, forged = urllib.parse.urlencode(locals_of("roy", "x")), f"203.0.113.{number}"
                self.assertEqual(service.request("POST", "/auth", form, **FORM, X_Forwarded_For=forged)[0], 401)

    def test_random_and_mutated_requests(self):
        fuzz(self, 4000)


def call(app, environ):
    """(status, body) of one request to a WSGI app."""
    statuses = []
    body = b"".join(app(environ, lambda status, headers, info=None: statuses.append(int(status[:3]))))
    return statuses[0], body


def fuzz(case, count, seed=1):
    """Send so many random and mutated requests to the app; none may be a 500 or raise."""
    case.settings = dataclasses.replace(case.settings, throttle_pair=0, throttle_address=0, throttle_name=0)
    case.add_user()
    token, errors, rng = case.login(), io.StringIO(), random.Random(seed)
    pieces = [
        "\x00",
        "\xff",
        "\ud800",
        "%00",
        "'",
        '"',
        "{",
        "[",
        "]]",
        "\r\n",
        " ",
        "\t",
        "é",
        "😀",
        "1e999",
        "null",
        "-1",
        "A" * 300,
    ]
    bodies = [
        '{"username": "alice", "password": "x"}',
        "username=alice&password=x",
        '{"refresh_token": "x"}',
        '{"scope": "others"}',
    ]
    bodies += ['{"name": "x", "expires_in": 5}', '{"current_password": "x", "new_password": "y"}', "[" * 2000, ""]
    routes = [(route.method, route.rule.replace("<sid>", "A" * 22)) for route in case.app.routes]

    def mutate(text):
        for _ in range(rng.randrange(4)):
            where = rng.randrange(len(text) + 1)
            text = text[:where] + rng.choice(pieces) + text[where + rng.randrange(3) :]
        return text

    for _ in range(count):
        method, path = rng.choice(routes) if rng.random() < 0.9 else ("GET", "/")
        method = rng.choice([method, method, method, "HEAD", "OPTIONS", "PUT", "X"])
        latin = mutate(path).encode("utf-8", "replace").decode("latin-1") if rng.random() < 0.3 else path
        body = mutate(rng.choice(bodies)).encode("utf-8", "surrogatepass")
        scheme = rng.choice(["JWT", "Bearer", "jwt", "Basic", ""])
        header = f"{scheme} {token if rng.random() < 0.5 else mutate(token)}".encode("utf-8", "replace").decode(
            "latin-1"
        )
        environ = {
            "REQUEST_METHOD": method,
            "PATH_INFO": latin,
            "QUERY_STRING": mutate(""),
            "CONTENT_LENGTH": str(len(body)),
            "CONTENT_TYPE": rng.choice(
                ["application/json", BadInputTest.FORM, "text/plain", mutate("application/json"), ""]
            ),
            "HTTP_AUTHORIZATION": header,
            "REMOTE_ADDR": "127.0.0.1",
            "wsgi.input": io.BytesIO(body),
            "wsgi.errors": errors,
            "SERVER_NAME": "a",
            "SERVER_PORT": "80",
            "wsgi.url_scheme": "http",
        }
        if not rng.random() < 0.8:
            del environ["HTTP_AUTHORIZATION"]
        status, body_of_answer = call(case.app, environ)
        case.assertLess(status, 500, (environ, body, body_of_answer))
        if status >= 300 and method != "HEAD" and status != 304:
            case.assertEqual(json.loads(body_of_answer)["status_code"], status, environ)
        if status == 204 and path.startswith("/auth"):  # a sign-out, or a new password
            case.store.set_password(case.store.find_user("alice"), server.hash_password("correct horse", 1))
            token = case.login()
    case.assertEqual(errors.getvalue(), "")


# --- Failures ---


class Load:
    """Threads that do each of some steps again and again: `with Load(step, …) as load`; a step returns a status."""

    def __init__(self, *steps):
        self.answers, self._stopping = [], threading.Event()  # (when it began, when it ended, status)
        self._threads = [threading.Thread(target=self._repeat, args=[step]) for step in steps]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stopping.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, step):
        while not self._stopping.is_set():
            begin = time.monotonic()
            try:
                status = step()
            except (OSError, http.client.HTTPException) as error:
                status = type(error).__name__
            self.answers.append((begin, time.monotonic(), status))

    def statuses(self, since=0):
        return {status for begin, _, status in self.answers.copy() if begin >= since}

    def first(self, status, since):
        """When the first answer of this status came to a request that began later than that."""
        return wait_for(
            lambda: next((end for begin, end, s in self.answers.copy() if begin >= since and s == status), 0)
        )

    def longest_pause(self):
        """Seconds between two good answers."""
        good = sorted(end for _, end, status in self.answers if status == 200)
        return max(later - earlier for earlier, later in itertools.pairwise(good))


class Client:
    """Somebody who signs in to a service, and remembers what was acknowledged."""

    def __init__(self, service, username, password="correct horse"):
        self.service, self.username, self.password = service, username, password
        self.access = self.refreshing = None

    def post(self, path, **fields):
        status, _, text = self.service.request("POST", path, urllib.parse.urlencode(fields), **FORM, **self.bearer())
        if status == 200:
            tokens = json.loads(text)
            self.access, self.refreshing = tokens["access_token"], tokens["refresh_token"]
        return status

    def on(self, service):
        """The same client, that turns to another service from now on."""
        self.service = service
        return self

    def bearer(self):
        return {"Authorization": f"Bearer {self.access}"} if self.access else {}

    def sign_in(self):
        self.access = None
        return self.post("/auth", username=self.username, password=self.password)

    def refresh(self):
        return self.post("/auth/refresh", refresh_token=self.refreshing)

    def check(self):
        return self.service.request("GET", "/rest-auth", **self.bearer())[0]

    def mixed(self):
        """A round of all: the first status that is not good, or 200."""
        for step in (self.sign_in, self.check, self.refresh, self.check):
            status = step()
            if status != 200:
                return status
        return 200


class FailureCase(Case):
    def own_mariadb(self, *options):
        """A MariaDB that a test may kill, and the URL of a database in it for an account of its own."""
        if mariadb is None:
            self.skipTest("no MariaDB or MySQL here: apt install mariadb-server")
        own = MariaDB("--innodb-flush-log-at-trx-commit=1", *options)
        self.addCleanup(own.stop)
        own.run("CREATE DATABASE auth")
        own.run("CREATE USER service@localhost")
        own.run("GRANT ALL ON auth.* TO service@localhost")
        return own, own.url("auth", "service")

    def use(self, database):
        """Let sign_in and its users be those of this database."""
        self.settings = dataclasses.replace(self.settings, database=database)
        self.__dict__.pop("sign_in", None)
        return {"AUTH_DATABASE": database, "AUTH_SECRET_KEY": SECRET}

    def fail_or_skip(self, why):
        """What CI has to have, others may go without."""
        (self.fail if os.environ.get("CI") else self.skipTest)(why)

    def connections(self, own):
        return [row[0] for row in own.run("SELECT id FROM information_schema.processlist WHERE user = 'service'")]


class MariaDBFailureTest(FailureCase):
    def test_a_server_that_is_killed_and_comes_back(self):
        own, url = self.own_mariadb()
        environment = self.use(url)
        self.add_user()
        self.sign_in.close()
        with Service(self.folder, **environment) as service:
            clients = [Client(service, "alice") for _ in range(4)]
            for client in clients:
                self.assertEqual(client.sign_in(), 200)
            steps = [client.check for client in clients[:2]] + [client.mixed for client in clients[2:]]
            with Load(*steps) as load:
                load.first(200, 0)
                before = len(self.connections(own))
                own.kill()
                load.first(503, 0)
                status, headers, text = service.request("GET", "/health")
                self.assertEqual((status, headers["Retry-After"]), (503, "2"))
                self.assertIn("database", json.loads(text)["description"])
                self.assertEqual(service.request("GET", "/.well-known/jwks.json")[0], 200)
                own.start()
                back = time.monotonic()
                self.assertLess(load.first(200, back) - back, 2)
                since = time.monotonic()
                for _ in range(20):
                    load.first(200, time.monotonic())
                self.assertEqual(load.statuses(since), {200})
                self.assertLessEqual(len(self.connections(own)), before + len(steps))
            self.assertEqual(load.statuses(), {200, 503})
        wait_for(lambda: not self.connections(own))
        events = [json.loads(line)["event"] for line in service.log.splitlines() if "database_" in line]
        self.assertEqual(events.count("database_host_failed"), 1)
        self.assertEqual(events.count("database_host_back"), 1)
        self.assertLess(len(events), 20)  # one for each change

    def test_connections_that_are_killed_or_time_out(self):
        own, url = self.own_mariadb()
        environment = self.use(url)
        self.add_user()
        self.sign_in.close()
        own.run("SET GLOBAL wait_timeout = 1")
        with Service(self.folder, **environment) as service:
            clients = [Client(service, "alice") for _ in range(6)]
            for client in clients:
                self.assertEqual(client.sign_in(), 200)
            with Load(*[c.check for c in clients[:3]], *[c.mixed for c in clients[3:]]) as load:
                for _ in range(40):
                    for connection in self.connections(own):
                        with contextlib.suppress(pymysql.OperationalError):  # it has ended by itself
                            own.run(f"KILL {connection}")
                    load.first(200, time.monotonic())
            self.assertEqual(load.statuses(), {200})
            wait_for(lambda: not self.connections(own))  # they time out
            self.assertEqual(clients[0].check(), 200)
            self.assertEqual(clients[0].refresh(), 200)
        self.assertNotIn("database_error", service.log)

    def test_a_server_that_hangs(self):
        """As behind a network that was cut: it takes connections and does not answer."""
        own, url = self.own_mariadb()
        environment = self.use(url)
        self.add_user()
        self.sign_in.close()
        timeouts = ["--connect-timeout", "1", "--read-timeout", "1"]
        with Service(self.folder, *timeouts, **environment) as service:
            client = Client(service, "alice")
            self.assertEqual(client.sign_in(), 200)
            own.process.send_signal(signal.SIGSTOP)
            try:
                with Load(*[client.check] * 20) as load:
                    since = load.first(503, 0)
                    wait_for(lambda: len([1 for begin, _, _ in load.answers.copy() if begin > since]) > 100)
                    self.assertEqual(load.statuses(since), {503})
                    self.assertEqual(service.request("GET", "/.well-known/jwks.json")[0], 200)
                    self.assertEqual(service.request("GET", "/health")[0], 503)
            finally:
                own.process.send_signal(signal.SIGCONT)
            wait_for(lambda: client.check() == 200)

    def test_a_read_only_server_still_checks_tokens(self):
        own, url = self.own_mariadb()
        environment = self.use(url)
        self.add_user()
        self.sign_in.close()
        with Service(self.folder, **environment) as service:
            client = Client(service, "alice")
            self.assertEqual(client.sign_in(), 200)
            own.run("SET GLOBAL read_only = 1")
            self.assertEqual((client.check(), client.refresh(), client.check()), (200, 503, 200))
            self.assertEqual(service.request("GET", "/health")[0], 200)
            own.run("SET GLOBAL read_only = 0")
            self.assertEqual(client.refresh(), 200)

    def test_a_read_only_or_dead_host_gives_way_to_the_next_and_comes_back(self):
        first, url = self.own_mariadb()
        second = MariaDB()
        self.addCleanup(second.stop)
        second.run("CREATE DATABASE auth")
        second.run("CREATE USER service@localhost")
        second.run("GRANT ALL ON auth.* TO service@localhost")
        place = f"127.0.0.1:{first.port}"
        self.use(url.replace(place, f"{place},127.0.0.1:{second.port}"))
        self.add_user()
        self.assertEqual(second.run("SHOW TABLES FROM auth"), ())
        server.open_sign_in(dataclasses.replace(self.settings, database=second.url("auth"))).close()
        first.run("SET GLOBAL read_only = 1")
        self.assertEqual(self.add_user("bob"), 1)  # the second's first user
        self.assertEqual(self.store.find_user("alice"), None)
        first.run("SET GLOBAL read_only = 0")
        wait_for(lambda: self.store.find_user("alice"))
        first.kill()
        self.assertEqual(self.store.find_user("bob").id, 1)
        first.start()
        wait_for(lambda: self.store.find_user("alice"))

    def test_a_host_that_hangs_or_turns_us_away_gives_way_to_the_next(self):
        first, url = self.own_mariadb()
        first.run("CREATE DATABASE there")
        first.run("GRANT ALL ON there.* TO service@localhost")
        hosts = f"127.0.0.1:{mariadb.port},127.0.0.1:{first.port}"
        self.use(url.replace(f"127.0.0.1:{first.port}", hosts).replace("/auth", "/there"))  # only the second has both
        self.settings = dataclasses.replace(self.settings, read_timeout=1)
        with self.assertLogs("auth", "WARNING") as logged:
            self.store.prepare()
            self.assertEqual(list(self.store._down), [("127.0.0.1", mariadb.port)])
        self.assertIn("database_host_failed", logged.output[0])
        first.process.send_signal(signal.SIGSTOP)
        try:
            hanging = dataclasses.replace(self.settings, database=first.url("auth", "service"))
            with contextlib.closing(server.Store.open(hanging)) as store:
                with self.assertRaises(server.Unavailable):  # in its handshake
                    store.ping()
                self.assertEqual(list(store._down), [("127.0.0.1", first.port)])
        finally:
            first.process.send_signal(signal.SIGCONT)

    def test_waiting_for_a_lock_is_no_failure_of_the_host(self):
        own, url = self.own_mariadb()
        place = f"127.0.0.1:{own.port}"
        self.use(url.replace(place, f"{place},127.0.0.1:{mariadb.port}"))
        self.settings = dataclasses.replace(self.settings, read_timeout=2)
        alice = self.store.get_user(self.add_user())
        with contextlib.closing(own.connect("auth")) as other, other.cursor() as cursor:
            cursor.execute("BEGIN")
            cursor.execute("SELECT * FROM user FOR UPDATE")
            with self.assertRaises(server.Unavailable) as caught:
                self.store.replace_hash(alice, "another")
            self.assertEqual(caught.exception.__cause__.args[0], 1205)
            self.assertEqual(self.store._down, {})
        self.assertTrue(self.store.replace_hash(alice, "another"))

    def test_a_commit_whose_answer_was_lost_counts_once(self):
        """The connection dies after COMMIT has been sent, as `kill -9` of the server can have it."""
        own, url = self.own_mariadb()
        self.use(url)
        alice = self.store.get_user(self.add_user())
        session = self.sign_in._new_session(alice.id, "", "", NOW)
        later = dataclasses.replace(session, generation=2)
        for done, expected in [
            (lambda: self.store.add_user("bob", "hash"), 2),
            (lambda: self.store.add_session(session, alice.password_hash), True),
            (lambda: self.store.replace_hash(alice, "another"), True),
            (lambda: self.store.set_password(self.store.get_user(1), "third", keep=session.id), True),
            (lambda: self.store.advance_session(later) or self.store.get_session(session.id, NOW)[0] == later, True),
        ]:
            commit, lost = pymysql.connections.Connection.commit, []

            def lose(connection, commit=commit, lost=lost):
                commit(connection)
                if not lost:
                    lost.append(connection)
                    raise pymysql.OperationalError(2013, "Lost connection")

            with mock.patch("pymysql.connections.Connection.commit", lose):
                self.assertEqual(done(), expected)
            self.assertTrue(lost)
        self.assertEqual([user.username for user in self.store.list_users()], ["alice", "bob"])
        self.assertEqual(len(self.store.list_sessions(1, NOW)), 1)


class SQLiteFailureTest(FailureCase):
    def assert_reads_and_does_not_write(self, client):
        self.assertEqual(client.check(), 200)
        status, headers, _ = client.service.request("POST", "/auth", "username=alice&password=correct+horse", **FORM)
        self.assertEqual((status, headers["Retry-After"]), (503, "2"))
        self.assertEqual(client.check(), 200)

    def test_a_disk_that_is_full_and_has_room_again(self):
        disk = self.folder / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "rest-auth-test", disk]
        if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
            self.skipTest("no disk may be mounted here")
        self.addCleanup(subprocess.run, ["umount", disk], check=True)
        environment = self.use(f"sqlite:///{disk}/auth.db")
        self.add_user()
        with Service(self.folder, **environment) as service:
            client = Client(service, "alice")
            self.assertEqual(client.sign_in(), 200)
            with contextlib.suppress(OSError), open(disk / "rubbish", "wb", buffering=0) as rubbish:
                while rubbish.write(b"x" * 512):
                    pass
            wait_for(
                lambda: service.request("POST", "/auth", "username=alice&password=correct+horse", **FORM)[0] == 503
            )
            self.assert_reads_and_does_not_write(client)
            os.unlink(disk / "rubbish")
            self.assertEqual(client.refresh(), 200)
            self.assertEqual(client.sign_in(), 200)
            wait_for(lambda: client.refresh() == 200 and "database_back" in service.read_log())
        self.sign_in.close()
        self.assertIn('"error": "database or disk is full"', service.log)
        self.assertIn("database_back", service.log)

    def test_a_file_that_may_not_be_written_and_may_again(self):
        self.add_user()
        self.sign_in.login("alice", "correct horse", NOW)
        self.sign_in.close()
        if os.geteuid() == 0:  # whom no mode keeps out
            for path in [self.folder, *self.folder.iterdir()]:
                shutil.chown(path, "nobody")
            self.addCleanup(os.seteuid, 0)
            os.seteuid(pwd.getpwnam("nobody").pw_uid)
        os.chmod(self.folder / "auth.db", 0o444)
        self.__dict__.pop("sign_in")
        descriptors = set()
        for _ in range(20):
            self.assertTrue(self.store.find_user("alice"))
            self.store.version(NOW)
            with self.assertRaises(server.Unavailable):
                self.add_user("bob")
            descriptors.add(len(os.listdir("/proc/self/fd")))
        self.assertLess(max(descriptors) - min(descriptors), 5)
        for path in self.folder.glob("auth.db*"):
            path.chmod(0o600)
        self.assertTrue(self.add_user("bob"))


class DurabilityTest(FailureCase):
    """`kill -9` at random moments: what was acknowledged is there, and nothing is half done."""

    ADD_USERS = """
import sys; sys.path.insert(0, sys.argv[1])
import server
sign_in = server.open_sign_in(server.Settings.load())
for number in range(1000):
    sign_in.store.add_user(f"{sys.argv[2]}-{number}", f"hash {number}")
    print(number, flush=True)
"""

    def test_sqlite(self):
        self.kill_at_random_moments(f"sqlite:///{self.folder}/auth.db")

    def test_mariadb(self):
        self.kill_at_random_moments(self.own_mariadb()[1])

    def kill_at_random_moments(self, url, rounds=10):
        environment, rng, added, passwords = self.use(url) | {"PYTHONUNBUFFERED": "1"}, random.Random(1), {}, {}
        for name in ("alice", "bob", "carol"):
            self.add_user(name)
        for number in range(rounds):
            with Service(self.folder, **environment) as service:
                clients = [Client(service, name, passwords.get(name, "correct horse")) for name in ("alice", "bob")]
                refreshing = Client(service, "carol")
                for client in [*clients, refreshing]:
                    self.assertEqual(client.sign_in(), 200, client.username)
                attempts = {client.username: [] for client in clients}
                command = [sys.executable, "-c", self.ADD_USERS, HERE, f"user{number}"]
                adding = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
                steps = [functools.partial(self.change_password, client, attempts) for client in clients]
                with Load(refreshing.refresh, *steps) as load:
                    wanted = rng.randrange(50, 400)
                    wait_for(lambda load=load, wanted=wanted: len(load.answers) >= wanted, 60)
                    service.process.kill()
                    adding.kill()
                    service.process.wait()
                    load.first("ConnectionRefusedError", 0)
                added[number] = len(adding.communicate()[0].splitlines())
                acknowledged = load.statuses() - {"ConnectionRefusedError"}
                self.assertLessEqual(acknowledged, {200, 204, "RemoteDisconnected", "ConnectionResetError"})
            with Service(self.folder, **environment) as service:
                refreshing.service = service
                self.assertEqual(refreshing.refresh(), 200)
                for client in clients:  # the last that was acknowledged, or one that was under way
                    client.service, tries = service, [client.password, *attempts[client.username]]
                    good = [text for text in tries if Client(service, client.username, text).sign_in() == 200]
                    self.assertEqual(len(good), 1, tries)
                    passwords[client.username] = good[0]
            self.assert_whole(added)
        self.assertGreater(sum(added.values()), 100)

    def change_password(self, client, attempts):
        new = f"password {time.monotonic_ns()}"
        body = urllib.parse.urlencode({"current_password": client.password, "new_password": new})
        attempts[client.username].append(new)
        try:
            status = client.service.request("PUT", "/auth/password", body, **FORM, **client.bearer())[0]
        except ConnectionRefusedError:  # it was never under way
            attempts[client.username].pop()
            raise
        if status == 204:
            client.password = new
            attempts[client.username].clear()
        return status

    def assert_whole(self, added):
        """Every user that was acknowledged is there, and no session is in an impossible state."""
        self.assertEqual(self.store.missing_tables(), [])
        hashes = {user.username: user.password_hash for user in self.store.list_users()}
        for number, count in added.items():
            for index in range(count):
                self.assertEqual(hashes.get(f"user{number}-{index}"), f"hash {index}")
        impossible = "created > last_used OR rotated < created OR expires <= created OR generation < 1"
        orphans = "NOT EXISTS (SELECT 1 FROM user WHERE id = user_id)"
        self.assertFalse(self.store._read(f"SELECT id FROM auth_session WHERE {impossible} OR {orphans}"))
        if self.store.database.kind == "sqlite":
            self.assertEqual(self.store._read("PRAGMA integrity_check"), [("ok",)])

    def test_a_first_start_that_was_killed_does_not_stop_the_second(self):
        rng = random.Random(1)
        for _ in range(10):
            with tempfile.TemporaryDirectory() as folder:
                environment = clean_environment()
                command = [sys.executable, HERE / "server.py", "--port", "0"]
                first = subprocess.Popen(command, cwd=folder, env=environment, stdout=-3, stderr=-3)
                moment = rng.choice(["auth.db", "auth.db-wal", "auth.keys.draft", "auth.keys"])
                deadline = time.monotonic() + 2
                while time.monotonic() < deadline and not os.path.lexists(f"{folder}/{moment}"):
                    pass
                first.kill()
                first.wait()
                with Service(folder) as service:
                    self.assertEqual(service.request("GET", "/health")[0], 200)


class StopTest(FailureCase):
    def in_flight(self, service, checks=150, sign_ins=50):
        """So many requests at once: a list of futures, and what waits for them."""
        client = Client(service, "alice")
        self.assertEqual(client.sign_in(), 200)
        pool = concurrent.futures.ThreadPoolExecutor(checks + sign_ins)
        self.addCleanup(pool.shutdown)
        many = [pool.submit(Client(service, "alice").sign_in) for _ in range(sign_ins)]
        return many + [pool.submit(client.check) for _ in range(checks)]

    def test_every_request_is_answered_while_another_process_takes_the_socket_over(self):
        environment = self.use(self.database) | {"AUTH_PBKDF2_ITERATIONS": "100000"}
        self.store.add_user("alice", server.hash_password("correct horse", 100000))
        for processes in ("1", "2"):
            with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
                arguments = ["--processes", processes]
                with Service(self.folder, *arguments, listener=listener, **environment) as first:
                    futures = self.in_flight(first)
                    wait_for(lambda futures=futures: any(future.done() for future in futures))
                    with Service(self.folder, *arguments, listener=listener, **environment) as second:
                        self.assertEqual(first.stop(signal.SIGTERM), 0)
                        self.assertEqual({future.result() for future in futures}, {200})
                        self.assertEqual(second.request("GET", "/health")[0], 200)

    def test_a_signal_to_the_whole_group_is_one_and_not_two(self):
        """Ctrl-C and systemd send theirs to the children as well, and the parent passes its own on."""
        environment = self.use(self.database) | {"AUTH_PBKDF2_ITERATIONS": "100000"}
        self.store.add_user("alice", server.hash_password("correct horse", 100000))
        with Service(self.folder, "--processes", "2", **environment) as service:
            wait_for(lambda: len(ProcessesTest.children(self, service)) == 2)
            futures = self.in_flight(service, checks=0, sign_ins=30)
            wait_for(lambda: any(future.done() for future in futures))
            for pid in [*ProcessesTest.children(self, service), service.process.pid]:
                os.kill(pid, signal.SIGINT)
            self.assertEqual({future.result() for future in futures}, {200})
            self.assertEqual(service.process.wait(30), 0)

    def test_every_request_is_answered_by_one_that_stops_alone(self):
        environment = self.use(self.database) | {"AUTH_PBKDF2_ITERATIONS": "100000"}
        self.store.add_user("alice", server.hash_password("correct horse", 100000))
        with Service(self.folder, **environment) as service:
            held = http.client.HTTPConnection(*service.address, timeout=30)  # has been answered, and stays open
            held.request("GET", "/health")
            self.assertEqual(held.getresponse().read(), b'{"status": "ok"}\n')
            started = [http.client.HTTPConnection(*service.address, timeout=30) for _ in range(200)]
            for number, connection in enumerate(started):
                path = "/auth" if number % 4 == 0 else "/health"
                connection.request(
                    "POST" if path == "/auth" else "GET",
                    path,
                    "username=alice&password=correct+horse",
                    {"Content-Type": BadInputTest.FORM},
                )
            service.process.send_signal(signal.SIGTERM)
            statuses = []
            for connection in started:
                with contextlib.closing(connection):
                    answer = connection.getresponse()
                    statuses.append(answer.status)
                    answer.read()
            held.close()
            self.assertEqual(set(statuses), {200})
            self.assertEqual(service.process.wait(30), 0)
            with self.assertRaises(ConnectionRefusedError):
                service.request("GET", "/health")

    def test_the_time_to_finish_is_bounded_and_a_second_signal_ends_it_at_once(self):
        for arguments, signals, status in [(["--stop-timeout", "1"], 1, 0), (["--stop-timeout", "600"], 2, 1)]:
            for processes in ("1", "2"):
                self.__dict__.pop("sign_in", None)
                self.store.prepare()
                with Service(self.folder, *arguments, "--processes", processes, AUTH_DATABASE=self.database) as service:
                    wait_for(lambda service=service: service.request("GET", "/health")[0] == 200)
                    with socket.create_connection(service.address) as unfinished:
                        unfinished.sendall(b"GET /health HTTP/1.1\r\n")
                        self.assertEqual(service.request("GET", "/health")[0], 200)
                        for number in range(signals):
                            if number:
                                wait_for(lambda service=service: self.is_closed(service))
                            service.process.send_signal(signal.SIGTERM)
                        self.assertEqual(service.process.wait(20), status)

    def is_closed(self, service):
        try:
            service.request("GET", "/health")
        except OSError:
            return True

    def test_restarts_behind_nginx_lose_no_request(self):
        if not program("nginx"):
            self.fail_or_skip("no nginx here: apt install nginx-light")
        environment = self.use(self.database)
        self.add_user()
        ports = [free_port(), free_port()]
        with contextlib.ExitStack() as stack:
            services = [self.start(stack, port, environment) for port in ports]
            proxy = stack.enter_context(Nginx(self.folder, ports))
            clients = [Client(proxy, "alice") for _ in range(8)]
            for client in clients:
                self.assertEqual(client.sign_in(), 200)
            with Load(*[c.check for c in clients[:4]], *[c.mixed for c in clients[4:]]) as load:
                for _ in range(3):
                    for index, port in enumerate(ports):
                        self.assertEqual(services[index].stop(signal.SIGTERM), 0)
                        load.first(200, time.monotonic())
                        services[index] = self.start(stack, port, environment)
                        wait_for(lambda again=services[index]: '"login"' in again.read_log())  # nginx has noticed
            self.assertEqual(load.statuses(), {200})
            with Load(*[c.check for c in clients[:4]], *[c.mixed for c in clients[4:]]) as load:
                load.first(200, 0)
                services[0].process.kill()
                killed = time.monotonic()
                for _ in range(50):
                    load.first(200, time.monotonic())
            self.assertLessEqual(load.statuses(), {200, 502})
            self.assertEqual(load.statuses(killed + 1), {200})
            failed = [status for _, _, status in load.answers if status != 200]
            text = f"\na service of two killed: {len(failed)} requests failed, the longest pause {load.longest_pause():.1f} s"
            print(text, file=sys.stderr)

    def start(self, stack, port, environment):
        folder = tempfile.mkdtemp(dir=self.folder)
        arguments = ["--port", str(port), "--trusted-proxy", "127.0.0.1"]
        return stack.enter_context(Service(folder, *arguments, **environment))


class Nginx:
    """The README's configuration of nginx in front of services on these ports."""

    request, raw = Service.request, Service.raw

    def __init__(self, folder, ports):
        self.folder, self.address = Path(folder), ("127.0.0.1", free_port())
        [configuration] = re.findall(r"(?ms)^```nginx\n(.*?)^```$", README)
        servers = "".join(f"  server 127.0.0.1:{port} fail_timeout=1s;\n" for port in ports)
        configuration = re.sub(r"(?m)(^ +server \S+:5000.*;\n)+", servers, configuration)
        configuration = re.sub(
            r"(?m)^ +ssl_.*\n", "", configuration.replace("listen 443 ssl;", f"listen 127.0.0.1:{self.address[1]};")
        )
        paths = "".join(
            f"{name}_temp_path {folder}/{name};\n" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        user = "user root;\n" if os.geteuid() == 0 else ""
        (self.folder / "nginx.conf").write_text(
            f"{user}pid {folder}/nginx.pid;\nerror_log {folder}/nginx.log;\ndaemon off;\nevents {{}}\n"
            f"http {{\naccess_log off;\n{paths}{configuration}}}\n"
        )

    def __enter__(self):
        self.process = subprocess.Popen(
            [program("nginx"), "-p", self.folder, "-c", self.folder / "nginx.conf"], stderr=-3
        )
        wait_for(self.is_up)
        return self

    def is_up(self):
        with contextlib.suppress(OSError):
            return self.request("GET", "/health")[0] == 200

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(30)


class Galera:
    """Three nodes of one MariaDB cluster on 127.0.0.1."""

    LIBRARIES = ["/usr/lib/galera/libgalera_smm.so", "/usr/lib64/galera-4/libgalera_smm.so"]

    def __init__(self):
        library = next(path for path in self.LIBRARIES if os.path.exists(path))
        groups = [free_port() for _ in range(3)]
        members = ",".join(f"127.0.0.1:{port}" for port in groups)
        self.nodes = []
        for number, group in enumerate(groups):
            provider = f"gmcast.listen_addr=tcp://127.0.0.1:{group};ist.recv_addr=127.0.0.1:{free_port()}"
            options = [
                "--wsrep-on=ON",
                f"--wsrep-provider={library}",
                f"--wsrep-provider-options={provider}",
                f"--wsrep-cluster-address=gcomm://{members}",
                "--wsrep-node-address=127.0.0.1",
                f"--wsrep-node-name=node{number}",
                "--wsrep-sst-method=rsync",
                f"--wsrep-sst-receive-address=127.0.0.1:{free_port()}",
                "--binlog-format=ROW",
                "--innodb-autoinc-lock-mode=2",
            ]
            self.nodes.append(MariaDB(*options, first=[] if number else ["--wsrep-new-cluster"]))
            wait_for(functools.partial(self.is_ready, number), 60)

    def is_ready(self, number):
        with contextlib.suppress(OSError, pymysql.Error):
            return self.nodes[number].run("SHOW STATUS LIKE 'wsrep_ready'")[0][1] == "ON"

    def stop(self):
        for node in self.nodes:
            node.stop()


class GaleraTest(FailureCase):
    """Two services over three nodes: sign in here, refresh there, sign out here."""

    def test_nodes_are_killed_under_load_and_return(self):
        if not any(map(os.path.exists, Galera.LIBRARIES)):
            self.fail_or_skip("no Galera here: apt install galera-4 rsync socat")
        cluster = Galera()
        self.addCleanup(cluster.stop)
        cluster.nodes[0].run("CREATE DATABASE auth")
        hosts = [f"127.0.0.1:{node.port}" for node in cluster.nodes]
        urls = [f"mysql://root@{','.join(hosts[i:] + hosts[:i])}/auth" for i in (0, 1)]
        self.use(urls[0])
        for number in range(4):
            self.add_user(f"user{number}")
        living, ended, self.roamed = [], [], random.Random(1)
        with contextlib.ExitStack() as stack:
            services = []
            for url in urls:
                folder = tempfile.mkdtemp(dir=self.folder)
                services.append(stack.enter_context(Service(folder, **self.use(url))))
            steps = [functools.partial(self.roam, services, f"user{n}", living, ended) for n in range(4)]
            with Load(*steps) as load:
                load.first(200, 0)
                cluster.nodes[0].kill()
                killed = time.monotonic()
                for _ in range(20):
                    load.first(200, time.monotonic())
            self.assertLessEqual(load.statuses(), {200, 503})
            after = [(begin, end) for begin, end, status in load.answers if status == 200 and begin >= killed]
            self.report("a node of three killed", load, killed, after)
            cluster.nodes[1].kill()
            for service in services:
                wait_for(lambda service=service: service.request("GET", "/health")[0] == 503)
                self.assertEqual(living[0].on(service).check(), 503)
                self.assertEqual(service.request("GET", "/.well-known/jwks.json")[0], 200)
            for number in (1, 0):
                cluster.nodes[number].start()
                wait_for(functools.partial(cluster.is_ready, number), 60)
                returned = time.monotonic()
            for service in services:
                wait_for(lambda service=service: service.request("GET", "/health")[0] == 200)
            print(
                f"\ntwo nodes of three back, the services good after {time.monotonic() - returned:.1f} s",
                file=sys.stderr,
            )
            self.assertGreater(min(len(living), len(ended)), 10)
            for service in services:
                self.assertEqual({client.on(service).check() for client in living}, {200})
                self.assertEqual({client.on(service).check() for client in ended}, {401})
            self.assertEqual({client.on(services[0]).refresh() for client in living}, {200})

    def roam(self, services, username, living, ended):
        here, there = self.roamed.sample(services, 2)
        client = Client(here, username)
        for step in (client.sign_in, client.on(there).refresh, client.on(here).check):
            if (status := step()) != 200:
                return status
        if self.roamed.random() < 0.5:
            living.append(client)
            return 200
        status = there.request("POST", "/auth/logout", **client.bearer())[0]
        if status != 204:
            return status
        ended.append(client)
        status = client.on(here).check()
        return {401: 200, 200: "accepted after its sign-out"}.get(status, status)

    def report(self, what, load, killed, after):
        pause = load.longest_pause()
        first = min(end for _, end in after) - killed
        text = f"\n{what}: the longest pause {pause:.1f} s, the first good answer after {first:.1f} s"
        print(text, file=sys.stderr)


class MetricsTest(Case):
    def scrape(self, address):
        connection = http.client.HTTPConnection(*address, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            answer = connection.getresponse()
            self.assertEqual(answer.headers["Content-Type"], "text/plain; version=0.0.4; charset=utf-8")
            lines = answer.read().decode().splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        for line in lines:
            self.assertRegex(
                line, r'^(# (HELP|TYPE) rest_auth_\w+ .+|rest_auth_\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [0-9.]+)$'
            )
        self.assertEqual(len({name for name, _ in pairs}), len(pairs))
        return {name.removeprefix("rest_auth_"): float(number) for name, number in pairs}

    def test_off_unless_asked_for_and_never_on_the_listener_of_all(self):
        address = "127.0.0.1", free_port()
        with Service(self.folder, "--demo") as service:
            self.assertEqual(service.request("GET", "/metrics")[0], 404)
        with Service(self.folder, "--demo", "--metrics", str(address[1])) as service:
            self.assertEqual(service.request("GET", "/metrics")[0], 404)
            service.login("roy", "roy")
            self.assertEqual(self.scrape(address)["sessions"], 1)
            taken = subprocess.run(
                [sys.executable, HERE / "server.py", "--demo", "--port", "0", "--metrics", str(address[1])],
                capture_output=True,
                text=True,
            )
            self.assertRegex(taken.stderr, "Address already in use.*choose another with --metrics")

    def test_several_processes_count_together_and_a_killed_one_takes_nothing_along(self):
        address = "127.0.0.1", free_port()
        self.add_user()
        self.sign_in.close()
        arguments = ["--processes", "2", "--metrics", f"127.0.0.1:{address[1]}"]
        begun = time.time()
        with Service(self.folder, *arguments, AUTH_DATABASE=self.database) as service:
            client = Client(service, "alice")
            for _ in range(4):
                self.assertEqual(client.sign_in(), 200)
            for _ in range(20):
                self.assertEqual(client.check(), 200)
            self.assertEqual(Client(service, "alice", "wrong").sign_in(), 401)
            service.request("GET", "/nowhere")
            expected = {
                'requests_total{route="POST /auth",status="200"}': 4,
                'requests_total{route="POST /auth",status="401"}': 1,
                'requests_total{route="GET /rest-auth",status="200"}': 20,
                'requests_total{route="none",status="404"}': 1,
                'events_total{event="login"}': 4,
                'events_total{event="login_failed"}': 1,
                "sessions": 4,
                "hash_queue": 0,
            }
            for _ in range(6):
                found = self.scrape(address)
                self.assertEqual({name: found.get(name) for name in expected}, expected)
            tokens = found['token_memory_total{found="yes"}'] + found['token_memory_total{found="no"}']
            self.assertEqual(tokens, 20)
            self.assertAlmostEqual(found["process_start_time_seconds"], begun, delta=10)
            memories = [found[f'process_resident_memory_bytes{{process="{n}"}}'] for n in (0, 1)]
            self.assertTrue(all(10e6 < memory < 200e6 for memory in memories), memories)
            children = ProcessesTest.children(self, service)
            os.kill(next(iter(children)), signal.SIGKILL)
            wait_for(lambda: len(ProcessesTest.children(self, service) - children) == 1)
            for _ in range(4):
                found = self.scrape(address)
                self.assertEqual({name: found.get(name) for name in expected}, expected)
            self.assertEqual(found['events_total{event="process_died"}'], 1)

    def test_every_event_is_counted(self):
        names = re.findall(r'event\(\s*"(\w+)"', (HERE / "server.py").read_text("utf-8"))
        self.assertGreater(len(names), 20)
        self.assertEqual(set(names), set(server.EVENTS))


# --- README ---


class ReadmeTest(MySQLCase):
    """What the README shows is run, in a copy of the project, and what comes out is compared with what it shows."""

    def setUp(self):
        super().setUp()
        for name in ["server.py", "schema.sql", "requirements.txt"]:
            shutil.copy(HERE / name, self.folder)
        self.port, self.metrics_port = str(free_port()), str(free_port())
        self.environment = clean_environment()
        self.environment |= {"AUTH_PORT": self.port, "PYTHONUNBUFFERED": "1"}
        self.process = None
        self.addCleanup(self.stop)

    def blocks(self, language):
        """The code blocks of the README, with a free port in place of theirs."""
        found = re.findall(rf"(?ms)^```{language}\n(.*?)^```$", README)
        found = [re.sub(r":5000|port=8080", lambda port: port[0][:-4] + self.port, block) for block in found]
        return [re.sub(r"(?<=[: ])9100", self.metrics_port, block) for block in found]

    def stop(self):
        if self.process:
            self.process.terminate()
            self.process.wait(30)
            self.process.stdout.close()

    def start(self, command, lines):
        """Start a command that serves, in place of the one before; return its first lines."""
        self.stop()
        *before, last = command.split(" && ")
        self.process = subprocess.Popen(
            ["bash", "-c", " && ".join([*before, f"exec {last}"])],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=sys.stderr,
            text=True,
        )
        return [self.process.stdout.readline().rstrip("\n") for _ in range(lines)]

    def run_in_one_shell(self, commands):
        """The output lines of each command."""
        script = "".join(f"{command}\necho END-OF-ONE\n" for command in commands)
        script = f". ./variables 2>/dev/null\n{script}declare -p TOKEN > variables 2>/dev/null\n"
        options = {"cwd": self.folder, "env": self.environment, "capture_output": True, "text": True}
        done = subprocess.run(["bash", "-c", script], **options)
        return [text.split("\n")[:-1] for text in re.split(r"END-OF-ONE\n", done.stdout)[:-1]]

    def assert_prints(self, command, printed, shown):
        self.assertEqual(len(printed), len(shown), (command, printed))
        for line, expected in zip(printed, shown, strict=True):
            pattern = r"[\w./-]+".join(map(re.escape, expected.split("…")))
            self.assertRegex(line, f"^{pattern}$", command)

    def test_consoles(self):
        for block in self.blocks("console"):
            steps = [step.rstrip("\n").split("\n") for step in re.split(r"(?m)^\$ ", block)[1:]]
            for serves, group in itertools.groupby(steps, lambda step: "rest-auth " in "".join(step[1:2])):
                group = [step for step in group if not step[0].endswith("-m unittest")]  # that is what runs just now
                if serves:
                    outputs = [self.start(command, len(shown)) for command, *shown in group]
                else:
                    outputs = self.run_in_one_shell([command for command, *_ in group])
                for (command, *shown), printed in zip(group, outputs, strict=True):
                    self.assert_prints(command, printed, shown)

    def test_python(self):
        settings = Settings(database=self.database_of_folder(), keys=str(self.folder / "auth.keys"))
        sign_in = server.open_sign_in(settings)
        self.addCleanup(sign_in.close)
        sign_in.store.add_user("alice", server.hash_password("correct horse", 1))
        token = sign_in.login("alice", "correct horse", time.time())["access_token"]
        *here, elsewhere = self.blocks("python")
        for block, expected in zip(here, ["alice", 1], strict=True):
            self.assertLessEqual(len(block.strip().split("\n")), 10)
            (self.folder / "hello.py").write_text(block)
            self.start(f"{sys.executable} hello.py 2>&1", 0)
            wait_for(lambda: self.fetch("/hello") == 401)
            self.assertEqual(self.fetch("/hello", token), {"hello": expected})
        server.rotate_key_file(self.folder / "auth.keys", "EdDSA")
        with Service(self.folder) as issuer:
            elsewhere = elsewhere.replace(f":{self.port}/", f":{issuer.address[1]}/")
            (self.folder / "hello.py").write_text(elsewhere)
            self.start(f"{sys.executable} hello.py 2>&1", 0)
            wait_for(lambda: self.fetch("/hello") == 401)
            token = issuer.login("alice", "correct horse")
            self.assertEqual(self.fetch("/hello", token), {"hello": 1})

    def database_of_folder(self):
        return f"sqlite:///{self.folder}/auth.db"

    def fetch(self, path, token=None, body=None):
        """The JSON of a 200, else the status, or None where nobody listens."""
        with contextlib.suppress(OSError):
            connection = http.client.HTTPConnection("127.0.0.1", int(self.port), timeout=30)
            with contextlib.closing(connection):
                headers = {"Authorization": f"Bearer {token}"} if token else {}
                connection.request(
                    "POST" if body else "GET", path, body, headers | ({"Content-Type": BadInputTest.FORM})
                )
                answer = connection.getresponse()
                return json.loads(answer.read()) if answer.status == 200 else answer.status

    def block_with(self, text):
        """The one block of shell commands that this text is in."""
        [block] = [block for block in self.blocks("sh") if text in block]
        return block

    def test_backing_up_and_putting_back(self):
        if not program("sqlite3"):
            FailureCase.fail_or_skip(self, "no sqlite3 here: apt install sqlite3")
        options = {"cwd": self.folder, "env": self.environment, "check": True}
        settings = Settings(database=self.database_of_folder(), secret_key=SECRET)
        with contextlib.closing(server.open_sign_in(settings)) as sign_in:
            sign_in.store.add_user("alice", server.hash_password("correct horse", 1))
            token = sign_in.login("alice", "correct horse", NOW)["access_token"]
            subprocess.run(["bash", "-c", self.block_with(".backup")], **options)
            sign_in.store.add_user("bob", "x")
        self.assertEqual(stat.S_IMODE((self.folder / "copy.db").stat().st_mode), 0o600)
        back = "rm -f auth.db-wal auth.db-shm; cp copy.db auth.db; sqlite3 auth.db 'DELETE FROM auth_session'"
        self.assertIn("run `sqlite3 auth.db 'DELETE FROM auth_session'`", README)
        subprocess.run(["bash", "-c", back], **options)
        with contextlib.closing(server.open_sign_in(settings)) as sign_in:
            self.assertEqual([user.username for user in sign_in.store.list_users()], ["alice"])
            with self.assertRaises(server.SessionEnded):
                sign_in.authenticate(token, NOW)

    def test_moving_from_sqlite_to_mariadb(self):
        self.environment["AUTH_PBKDF2_ITERATIONS"] = "1"
        block = self.block_with("user export").replace("mysql://rest-auth:password@127.0.0.1:3306/auth", self.database)
        block = block.replace(".venv/bin/python", sys.executable)
        add = f"echo 'correct horse' | {sys.executable} server.py user add alice\n"
        options = {"cwd": self.folder, "env": self.environment, "capture_output": True, "text": True}
        done = subprocess.run(["bash", "-c", f"set -e\n{add}{block}"], **options)
        self.assertIn("1 users imported into mysql://", done.stdout, done.stderr)
        self.assertIn("access_token", self.sign_in.login("alice", "correct horse", time.time()))

    def test_several_hosts(self):
        show = f"{sys.executable} -c 'import server; print(server.Settings.load())'"
        command = ["bash", "-c", self.block_with("10.0.0.3") + show]
        shown = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        self.assertIn("trusted_proxy='10.0.0.9'", shown.stdout, shown.stderr)

    def test_moving_from_flask_jwt(self):
        self.raw_sql(TUTORIAL_TABLE)
        self.raw_sql("INSERT INTO user (username, password) VALUES ('roy', %s)", TUTORIAL_HASH)
        block = self.block_with("roytuts")
        block = block.replace("mysql://roytuts:password@127.0.0.1:3306/roytuts", self.database)
        block = block.replace("the JWT_SECRET_KEY of your app", SECRET).replace(".venv/bin/python", sys.executable)
        export, serve = block.strip().split("\n")
        [banner] = self.start(f"{export} && {serve}", 1)
        self.assertEqual(banner.rpartition(", keys in ")[2], "AUTH_SECRET_KEY")
        self.assertIn("access_token", self.fetch("/auth", body="username=roy&password=roy"))
        self.assertIsInstance(self.fetch("/rest-auth", self.token()), str)  # as the old app signed it


if __name__ == "__main__":
    unittest.main()
