"""The ideal loop's statements: each one commit, or the two inside the orchestrator's transaction.
No other SQL is in the ideal loop, and no logic is here.
"""

FRESH_FACTS = """
WITH g AS (INSERT INTO gate SELECT * FROM unnest($1::uuid[], $2::uuid[]))
INSERT INTO ledger SELECT * FROM unnest($2::uuid[], $3::text[], $4::integer[], $5::bigint[], $6::bytea[])"""

LOCK = "SELECT id, seq, state FROM instances WHERE id = ANY ($1::uuid[]) ORDER BY id FOR UPDATE"

STEPS = """
WITH l AS (INSERT INTO ledger SELECT * FROM unnest($1::uuid[], $2::text[], $3::integer[], $4::bigint[], $5::bytea[])),
     c AS (INSERT INTO instances SELECT * FROM unnest($6::uuid[], $7::bigint[], $8::bytea[]))
UPDATE instances i SET seq = m.seq, state = m.state
  FROM unnest($9::uuid[], $10::bigint[], $11::bytea[]) AS m (id, seq, state) WHERE i.id = m.id AND i.seq = m.seq - 1"""

CLAIMED = """
WITH l AS (INSERT INTO ledger SELECT * FROM unnest($1::uuid[], $2::text[], $3::integer[], $4::bigint[], $5::bytea[])),
     p AS (UPDATE claims SET due_at = NULL WHERE id = ANY ($7::uuid[]))
INSERT INTO claims SELECT c.id, 'leased', 1, now() + interval '30 s', c.payload, NULL
  FROM unnest($1::uuid[], $6::bytea[]) AS c (id, payload)"""

SETTLE = """
UPDATE claims c SET state = 'done', outcome = s.outcome, due_at = now() + interval '30 s'
  FROM unnest($1::uuid[], $2::bytea[]) AS s (id, outcome)
 WHERE c.id = s.id AND c.epoch = 1 AND c.state = 'leased' RETURNING c.id"""

KNOWN = "SELECT id, emitted FROM ledger WHERE id = ANY ($1::uuid[])"
KNOWN_FACTS = "SELECT hash, emitted FROM gate JOIN ledger ON id = ledger_id WHERE hash = ANY ($1::uuid[])"
KNOWN_OUTCOMES = "SELECT id, outcome FROM claims WHERE id = ANY ($1::uuid[]) AND outcome IS NOT NULL"
