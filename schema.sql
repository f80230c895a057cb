-- The tables of rest-auth, for SQLite, MariaDB and MySQL. Text in /*! */ is code for MariaDB and
-- MySQL, and a comment for SQLite. Existing tables stay as they are, so this may run again.

CREATE TABLE IF NOT EXISTS user (
  id INTEGER NOT NULL PRIMARY KEY /*! AUTO_INCREMENT */,
  username VARCHAR(255) /*! COLLATE utf8mb4_bin */ NOT NULL UNIQUE,
  password VARCHAR(255) NOT NULL
) /*! ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 */;

-- What is known of a user beside the table user, which may belong to another program.
CREATE TABLE IF NOT EXISTS auth_user (
  user_id BIGINT NOT NULL PRIMARY KEY,
  roles VARCHAR(1024) /*! CHARACTER SET ascii COLLATE ascii_bin */ NOT NULL -- with blanks between
) /*! ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 */;

-- One row per login or named API token. Times are seconds since 1970. There is no foreign key,
-- because an older user table may have another type or engine.
CREATE TABLE IF NOT EXISTS auth_session (
  id VARCHAR(22) /*! CHARACTER SET ascii COLLATE ascii_bin */ NOT NULL PRIMARY KEY,
  user_id BIGINT NOT NULL,
  kind VARCHAR(10) NOT NULL, -- login, or api for an API token
  label VARCHAR(255) NOT NULL, -- User-Agent of the login, or name of the API token
  ip_address VARCHAR(45) NOT NULL,
  created_at BIGINT NOT NULL,
  last_used_at BIGINT NOT NULL,
  expires_at BIGINT NOT NULL,
  refresh_counter BIGINT NOT NULL, -- counts the refresh tokens from 1; 0 for an API token
  refreshed_at BIGINT NOT NULL,
  kid VARCHAR(43) NOT NULL, -- key of the current refresh token or API token
  roles VARCHAR(1024) NOT NULL DEFAULT '', -- that an API token asked for, with blanks between
  read_only BIGINT NOT NULL DEFAULT 0, -- 1 for an API token that is good for GET and HEAD alone
  UNIQUE (user_id, id),
  UNIQUE (expires_at, id)
) /*! ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 */;

-- Throttling of failed logins. A bucket is empty again at expires_at (seconds since 1970). The id
-- names an address, a username, or both, with the username as a pseudonym: people type passwords
-- into its field. A `known:` bucket is an address from which the username has logged in.
CREATE TABLE IF NOT EXISTS auth_bucket (
  id VARCHAR(100) /*! CHARACTER SET ascii COLLATE ascii_bin */ NOT NULL PRIMARY KEY,
  expires_at BIGINT NOT NULL,
  UNIQUE (expires_at, id)
) /*! ENGINE=InnoDB DEFAULT CHARSET=utf8mb4 */;
