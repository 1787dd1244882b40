"""What careless and hostile senders do, as tables: each with what has to be said of it.
Written for the process `order_exception`; nothing is sent from here.
"""

from tests.support.bad_input.http import HttpCase, http_cases
from tests.support.bad_input.kafka import KafkaCase, junk_for_our_topics, kafka_cases

__all__ = ["HttpCase", "KafkaCase", "http_cases", "junk_for_our_topics", "kafka_cases"]
