-- name: enter_watched
-- Rows for instances that were not seen before, so that there is something to lock. Sorted: no deadlock.
INSERT INTO watched (instance_id) SELECT unnest($1::uuid[]) ORDER BY 1 ON CONFLICT DO NOTHING;

-- name: lock_watched
-- What was seen of these instances, locked until the batch is written. Sorted: no deadlock.
SELECT instance_id, seq FROM watched WHERE instance_id = ANY ($1::uuid[]) ORDER BY instance_id FOR UPDATE;

-- name: save_watched
-- The new highest numbers; the rows are locked since `lock_watched`.
UPDATE watched w SET seq = n.seq
  FROM unnest($1::uuid[], $2::bigint[]) AS n (instance_id, seq) WHERE w.instance_id = n.instance_id;

-- name: insert_sends
-- Rides in the settlement of sends: those that went out or may have; an epoch is settled once, so is its line.
INSERT INTO sends (id, epoch, channel, template, recipients, recipients_hash, at, ms, ended)
SELECT s.* FROM unnest($1::uuid[], $2::integer[], $3::text[], $4::text[], $5::smallint[], $6::bytea[],
                       $7::timestamptz[], $8::integer[], $9::text[])
       AS s (id, epoch, channel, template, recipients, recipients_hash, at, ms, ended)
 WHERE ((s.id, s.epoch) IN (TABLE counted)) IS TRUE;

-- name: expire_sends
-- Attempts of days that the audit period has passed.
DELETE FROM sends WHERE id < $1;

-- name: expire_watched
-- Instances of days that the audit period has passed.
DELETE FROM watched WHERE instance_id < $1;
