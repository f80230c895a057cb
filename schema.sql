-- The tables of rest-auth, for SQLite, MariaDB and MySQL alike: what stands in /*! */ is code to
-- the latter two and a comment to SQLite. Nothing that exists is changed, so it may run twice.

CREATE TABLE IF NOT EXISTS user (
  id INTEGER NOT NULL PRIMARY KEY /*! AUTO_INCREMENT */,
  username VARCHAR(255) /*! COLLATE utf8mb4_bin */ NOT NULL UNIQUE,
  password VARCHAR(255) NOT NULL
) /*! ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 */;

-- One row per sign-in or named API token. Times are seconds since 1970. There is no foreign key:
-- a user table that was here before may be of another type or engine.
CREATE TABLE IF NOT EXISTS auth_session (
  id VARCHAR(22) /*! CHARACTER SET ascii COLLATE ascii_bin */ NOT NULL PRIMARY KEY,
  user_id BIGINT NOT NULL,
  name VARCHAR(255) NOT NULL,
  address VARCHAR(45) NOT NULL,
  created BIGINT NOT NULL,
  last_used BIGINT NOT NULL,
  expires BIGINT NOT NULL,
  generation BIGINT NOT NULL, -- of its refresh token, counted from 1; 0 is an API token, which has none
  rotated BIGINT NOT NULL, -- when this generation was made, and
  kid VARCHAR(43) NOT NULL, -- by which key
  UNIQUE (user_id, id),
  UNIQUE (expires, id)
) /*! ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 */;

-- Failed sign-ins, counted by user name and address, by address alone and by name alone; and where
-- a user has signed in from. A name stands as a digest, for people type passwords into its field.
CREATE TABLE IF NOT EXISTS auth_throttle (
  name VARCHAR(22) /*! CHARACTER SET ascii COLLATE ascii_bin */ NOT NULL, -- '' counts for all names
  address VARCHAR(45) NOT NULL, -- '' counts for all addresses
  failures BIGINT NOT NULL,
  since BIGINT NOT NULL, -- the first of them
  latest BIGINT NOT NULL, -- and the last
  signed_in BIGINT NOT NULL, -- the last good sign-in
  expires BIGINT NOT NULL,
  PRIMARY KEY (name, address),
  UNIQUE (expires, name, address)
) /*! ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 */;
