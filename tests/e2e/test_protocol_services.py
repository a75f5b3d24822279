"""What else nodes run, told through their records to all of a swarm, over real sockets."""

from protocol.credentials.records import Endpoint, Service
from protocol.identity import Identity
from tests.protocol_hosts import running
from tests.waiting import wait_until

NAME = "weights/0123"
FIRST, SECOND = Endpoint("10.0.0.1", 7000), Endpoint("10.0.0.2", 7001)


def test_everybody_hears_what_a_node_runs_and_where_it_is_now() -> None:
    identity = Identity.generate()
    with running() as (hub, seed), running(seed, identity=identity) as (server, _), running(seed) as (other, _):

        def known(*expected: Endpoint) -> None:
            found = [(identity.node_id, endpoint) for endpoint in expected]
            wait_until(lambda: hub.offers(NAME) == other.offers(NAME) == found, 20, f"{NAME} at {expected}")

        server.serve(Service(NAME, FIRST), Service("another", SECOND))
        known(FIRST)
        assert hub.offers("another") == [(identity.node_id, SECOND)] and hub.offers("weights") == []
        server.serve(Service(NAME, SECOND))
        known(SECOND)
        assert hub.offers("another") == []
        with running(seed) as (late, _):
            wait_until(lambda: late.offers(NAME) == [(identity.node_id, SECOND)], 20, "a late node to know")
        server.serve()
        known()


def test_an_addresss_key_tells_whose_it_is_once_its_record_came() -> None:
    identity = Identity.generate()
    with running(identity=identity) as (_, seed), running(seed) as (other, address):
        wait_until(lambda: other.node_at(seed) == identity.node_id, 20, "the seed's record")
        assert other.node_at(address) is None  # its own
