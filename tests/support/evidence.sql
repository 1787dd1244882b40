-- What a judge reads of each service's schema; `search_path` says which. Reads only.

-- name: ledger
-- Every row, without the bytes that it emitted.
SELECT id, disposition, topic, opening, note FROM ledger ORDER BY id;

-- name: claims
-- Every row, and whether it is due, now or later.
SELECT id, kind, state, due_at IS NOT NULL OR EXISTS (SELECT 1 FROM unpublished WHERE c.id = ANY (ids)) AS due
  FROM claims c;

-- name: instances
-- Every instance with its state.
SELECT id, status, seq, object_id, correlation_id, state FROM instances;

-- name: records
-- The index, with the acts that are not published.
SELECT r.id, r.root, r.state, r.topic, r.reason, r.instance_id, r.business_object_id, r.raised, r.published,
       (SELECT count(*) FROM act a WHERE a.record = r.id AND a.published_at IS NULL) AS unpublished
  FROM record r;

-- name: deaths
-- Every death that was filed.
SELECT id FROM death;

-- name: acts
-- Every act of a person.
SELECT id, record, verb, number, by, published_at IS NOT NULL AS published FROM act ORDER BY id;

-- name: running
-- How many instances there are, and how many still move by themselves.
SELECT count(*) AS n, count(*) FILTER (WHERE status IN ('running', 'waiting')) AS moving,
       count(*) FILTER (WHERE ended_at IS NOT NULL) AS ended FROM instances;

-- name: stuck
-- Some of those that still move, for a person to look at.
SELECT id, object_id, status, step, seq FROM instances WHERE status IN ('running', 'waiting') ORDER BY id LIMIT 5;

-- name: busy
-- Rows that somebody has to do something about; timers of the far future are not work.
SELECT count(*) AS n, min(due_at) AS next
  FROM (SELECT due_at FROM claims WHERE due_at IS NOT NULL AND kind <> 'timer'
         UNION ALL
        SELECT due_at FROM unpublished) AS work;

-- name: leased
-- Rows that some worker has in hand.
SELECT id, epoch FROM claims WHERE state = 'leased';

-- name: in_transaction
-- Who holds a transaction open at this moment and is not being served: by the port that it comes from.
SELECT client_port FROM pg_stat_activity WHERE state = 'idle in transaction';

-- name: writes
-- Whether a service of this role is within a transaction at this moment.
SELECT 1 FROM pg_stat_activity WHERE usename = $1 AND xact_start IS NOT NULL AND state <> 'idle' LIMIT 1;
