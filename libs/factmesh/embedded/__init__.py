"""Real Apache Kafka and real PostgreSQL from Python wheels: started and stopped by us, nothing else to install.
Only starting, stopping and finding them lives here; what runs on them does not know how they came to be.
"""

from factmesh.embedded.kafka import EmbeddedKafka
from factmesh.embedded.postgres import EmbeddedPostgres
from factmesh.embedded.process import EmbeddedError

__all__ = ["EmbeddedError", "EmbeddedKafka", "EmbeddedPostgres"]
