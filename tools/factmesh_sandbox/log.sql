-- The sandbox's own log. It knows nothing of the mesh; tests and the demo judge the mesh by it.

-- name: schema
-- Creates the tables once; a restarted sandbox goes on in the same file.
CREATE TABLE IF NOT EXISTS calls (
    seq             INTEGER PRIMARY KEY,
    at              TEXT NOT NULL,
    system          TEXT NOT NULL,
    operation       TEXT,
    method          TEXT NOT NULL,
    path            TEXT NOT NULL,
    idempotency_key TEXT,
    correlation_id  TEXT,
    traceparent     TEXT,
    subject         TEXT,
    body_sha256     TEXT NOT NULL,
    fault           TEXT,
    retry_after_s   INTEGER,
    status          INTEGER,
    replayed        INTEGER NOT NULL,
    answered        INTEGER NOT NULL
);
CREATE INDEX IF NOT EXISTS calls_by_subject ON calls (system, subject, operation, seq);
CREATE TABLE IF NOT EXISTS effects (
    seq             INTEGER PRIMARY KEY,
    at              TEXT NOT NULL,
    system          TEXT NOT NULL,
    kind            TEXT NOT NULL,
    number          INTEGER NOT NULL,
    effect_id       TEXT NOT NULL,
    subject         TEXT,
    idempotency_key TEXT,
    body            TEXT NOT NULL,
    response        TEXT NOT NULL,
    call            INTEGER NOT NULL REFERENCES calls (seq),
    UNIQUE (system, kind, number)
);
CREATE INDEX IF NOT EXISTS effects_by_subject ON effects (system, subject);
CREATE TABLE IF NOT EXISTS effect_fields (
    system TEXT NOT NULL, kind TEXT NOT NULL, field TEXT NOT NULL, value TEXT NOT NULL,
    effect INTEGER NOT NULL REFERENCES effects (seq),
    PRIMARY KEY (system, kind, field, value, effect)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS idempotency_keys (
    system TEXT NOT NULL, key TEXT NOT NULL, at_epoch_s REAL NOT NULL, request_sha256 TEXT NOT NULL,
    status INTEGER NOT NULL, response TEXT NOT NULL,
    PRIMARY KEY (system, key)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS mails (
    seq        INTEGER PRIMARY KEY,
    at         TEXT NOT NULL,
    mail_from  TEXT NOT NULL,
    rcpt_to    TEXT NOT NULL,
    message_id TEXT,
    subject    TEXT,
    ids        TEXT NOT NULL,
    body       TEXT NOT NULL,
    fault      TEXT,
    answered   INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS webhooks (
    seq        INTEGER PRIMARY KEY,
    at         TEXT NOT NULL,
    receiver   TEXT NOT NULL,
    webhook_id TEXT,
    verified   INTEGER NOT NULL,
    refusal    TEXT,
    body       TEXT NOT NULL,
    call       INTEGER NOT NULL REFERENCES calls (seq)
);
CREATE TABLE IF NOT EXISTS faults (
    system TEXT PRIMARY KEY, since_seq INTEGER NOT NULL, rules TEXT
);

-- name: pragmas
-- WAL lets judges read while we write. NORMAL: a commit is in the operating system's hands before the answer goes out,
-- which survives any kill of the process, the promise made here; only a power cut may lose the tail.
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;

-- name: add_call
-- One row a call, written before its answer goes out.
INSERT INTO calls (seq, at, system, operation, method, path, idempotency_key, correlation_id, traceparent, subject,
                   body_sha256, fault, retry_after_s, status, replayed, answered)
VALUES (:seq, :at, :system, :operation, :method, :path, :idempotency_key, :correlation_id, :traceparent, :subject,
        :body_sha256, :fault, :retry_after_s, :status, :replayed, :answered);

-- name: mark_unanswered
-- The caller had gone before the answer could be sent.
UPDATE calls SET answered = 0 WHERE seq = :seq;

-- name: add_effect
-- One row an effect, in the transaction of its call: work that is not here was not done.
INSERT INTO effects (seq, at, system, kind, number, effect_id, subject, idempotency_key, body, response, call)
VALUES (:seq, :at, :system, :kind, :number, :effect_id, :subject, :idempotency_key, :body, :response, :call);

-- name: add_effect_field
-- Makes an effect findable by a field that some look-up asks for.
INSERT OR IGNORE INTO effect_fields (system, kind, field, value, effect)
VALUES (:system, :kind, :field, :value, :effect);

-- name: backfill_effect_field
-- A look-up that was added to the file later finds the effects that were made before.
INSERT OR IGNORE INTO effect_fields (system, kind, field, value, effect)
SELECT system, kind, :field, CAST(json_extract(body, '$.' || :field) AS TEXT), seq FROM effects
WHERE system = :system AND kind = :kind AND json_extract(body, '$.' || :field) IS NOT NULL;

-- name: backfill_effect_id
-- The same for look-ups by the effect's own id.
INSERT OR IGNORE INTO effect_fields (system, kind, field, value, effect)
SELECT system, kind, 'id', effect_id, seq FROM effects WHERE system = :system AND kind = :kind;

-- name: remember_key
-- The recorded answer of a key; an expired one is replaced.
INSERT OR REPLACE INTO idempotency_keys (system, key, at_epoch_s, request_sha256, status, response)
VALUES (:system, :key, :at_epoch_s, :request_sha256, :status, :response);

-- name: find_key
-- What was answered under a key.
SELECT at_epoch_s, request_sha256, status, response FROM idempotency_keys WHERE system = :system AND key = :key;

-- name: add_mail
-- One row a message that was accepted, whether its sender got to know or not.
INSERT INTO mails (seq, at, mail_from, rcpt_to, message_id, subject, ids, body, fault, answered)
VALUES (:seq, :at, :mail_from, :rcpt_to, :message_id, :subject, :ids, :body, :fault, :answered);

-- name: add_webhook
-- One row a delivery that was taken in, verified or refused.
INSERT INTO webhooks (seq, at, receiver, webhook_id, verified, refusal, body, call)
VALUES (:seq, :at, :receiver, :webhook_id, :verified, :refusal, :body, :call);

-- name: put_faults
-- The rules given at run time; they outlive a restart. NULL rules: the file's own apply again.
INSERT OR REPLACE INTO faults (system, since_seq, rules) VALUES (:system, :since_seq, :rules);

-- name: all_faults
-- The rules given at run time.
SELECT system, since_seq, rules FROM faults;

-- name: count_attempts
-- How often a subject has tried an operation since its rules were set.
SELECT count(*) FROM calls WHERE system = :system AND subject IS :subject AND operation = :operation AND seq > :since_seq;

-- name: find_effects
-- The effects with a value in a findable field, oldest first, at most :count_max.
SELECT e.effect_id, e.number, e.subject, e.body, e.response FROM effect_fields f JOIN effects e ON e.seq = f.effect
WHERE f.system = :system AND f.kind = :kind AND f.field = :field AND f.value = :value ORDER BY e.seq LIMIT :count_max;

-- name: counters
-- Where the numbering goes on after a restart.
SELECT coalesce((SELECT max(seq) FROM calls), 0), coalesce((SELECT max(seq) FROM effects), 0),
       coalesce((SELECT max(seq) FROM mails), 0), coalesce((SELECT max(seq) FROM webhooks), 0);

-- name: effect_numbers
-- The last number given to each kind of effect.
SELECT system, kind, max(number) FROM effects GROUP BY system, kind;

-- name: read_calls
-- Calls for a judge; a NULL parameter does not filter.
SELECT * FROM calls WHERE (:system IS NULL OR system = :system) AND (:subject IS NULL OR subject = :subject)
  AND (:operation IS NULL OR operation = :operation) AND (:idempotency_key IS NULL OR idempotency_key = :idempotency_key)
ORDER BY seq;

-- name: read_effects
-- Effects for a judge; a NULL parameter does not filter.
SELECT * FROM effects WHERE (:system IS NULL OR system = :system) AND (:subject IS NULL OR subject = :subject)
  AND (:kind IS NULL OR kind = :kind) ORDER BY seq;

-- name: read_mails
-- Mails for a judge; a NULL recipient does not filter.
SELECT * FROM mails WHERE :recipient IS NULL
   OR EXISTS (SELECT 1 FROM json_each(mails.rcpt_to) WHERE lower(json_each.value) = lower(:recipient)) ORDER BY seq;

-- name: read_webhooks
-- Webhook deliveries for a judge; a NULL parameter does not filter.
SELECT * FROM webhooks WHERE (:receiver IS NULL OR receiver = :receiver)
  AND (:webhook_id IS NULL OR webhook_id = :webhook_id) ORDER BY seq;

-- name: effects_per_subject
-- How many effects each subject has in a system and kind: more than one is a double effect.
SELECT subject, count(*) FROM effects WHERE system = :system AND kind = :kind GROUP BY subject;

-- name: summary_calls
-- Calls by system, operation, fault and status.
SELECT system, operation, fault, status, answered, count(*) FROM calls GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5;

-- name: summary_effects
-- Effects, and subjects that have more than one, by system and kind.
SELECT system, kind, sum(n), count(*), sum(n > 1) FROM
  (SELECT system, kind, subject, count(*) AS n FROM effects GROUP BY system, kind, subject) GROUP BY system, kind;

-- name: summary_rest
-- Mails and webhooks.
SELECT (SELECT count(*) FROM mails), (SELECT count(*) FROM webhooks), (SELECT count(*) FROM webhooks WHERE verified);
