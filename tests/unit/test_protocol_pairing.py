"""Who is near whom: the same both ways, for a period that each pair has for itself."""

from protocol.limits.networks import counts_as
from protocol.membership.links import PERIOD_S, distance

UNIX = 1_700_000_000.0
NETWORKS = [f"93.184.{number}.0/24" for number in range(64)]


def test_a_distance_is_the_same_both_ways_and_another_for_each_pair() -> None:
    pairs = {(network, other): distance(network, other, UNIX) for network in NETWORKS[:8] for other in NETWORKS[8:16]}
    assert all(distance(other, one, UNIX) == far for (one, other), far in pairs.items())
    assert len(set(pairs.values())) == len(pairs) and all(0 <= far < 2**64 for far in pairs.values())


def test_a_distance_changes_once_in_a_period_each_pairs_at_a_time_of_its_own() -> None:
    times = [UNIX + PERIOD_S * part / 16 for part in range(17)]
    seen = [[distance(NETWORKS[0], other, unix) for unix in times] for other in NETWORKS[1:]]
    assert all(len(set(distances)) == 2 for distances in seen)
    changes = [sum(distances[part] != distances[part + 1] for distances in seen) for part in range(16)]  # 63 in all
    assert max(changes) <= 12 and sum(map(bool, changes)) >= 14


def test_who_is_in_no_public_network_is_near_by_its_address_and_on_this_machine_by_its_key() -> None:
    assert counts_as("93.184.216.34", "key") == "93.184.216.0/24"
    assert counts_as("192.168.0.8", "key") == counts_as("::ffff:192.168.0.8", "other") == "192.168.0.8"
    assert counts_as("fe80::1%eth0", "key") == "fe80::1"
    assert counts_as("127.0.0.1", "key") == counts_as("", "key") == "key"
