-- The tables of rest-auth, for SQLite, MariaDB and MySQL alike: what stands in /*! */ is code to
-- the latter two and a comment to SQLite. Nothing that exists is changed, so it may run twice.

CREATE TABLE IF NOT EXISTS user (
  id INTEGER NOT NULL PRIMARY KEY /*! AUTO_INCREMENT */,
  username VARCHAR(255) /*! COLLATE utf8mb4_bin */ NOT NULL UNIQUE,
  password VARCHAR(255) NOT NULL
) /*! ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 */;
