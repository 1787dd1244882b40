-- name: received
-- What intake holds of each fact that reached it by its topic: deliveries, and what became of the messages.
SELECT disposition, count(*) AS messages, sum(seen)::bigint AS deliveries FROM ledger WHERE topic = $1 GROUP BY 1;

-- name: instances
-- Instances by state.
SELECT status, count(*) AS n FROM instances_view GROUP BY 1 ORDER BY 1;

-- name: waiting
-- Attempts and sends that are not settled, those that wait for a retry among them, and outcomes not yet published.
SELECT count(*) FILTER (WHERE state = 'leased') AS working,
       count(*) FILTER (WHERE state = 'pending' AND attempts > 0) AS retrying,
       count(*) FILTER (WHERE due_at IS NOT NULL) + (SELECT count(*) FROM unpublished) AS due
  FROM claims WHERE kind <> 'timer';

-- name: quarantined
-- Records of the quarantine index by state.
SELECT state, count(*) AS n FROM record GROUP BY 1;
