"""A child process for the tests: one host that publishes "NAME n" five times a second and writes down what it hears.

python -m tests.protocol_speaker FOLDER SWARM_HEX NAME LISTEN [SEED_ADDRESS ...]

FOLDER/address has where it listens, FOLDER/heard one line for each item, FOLDER/rejected its
counters of what it refused, FOLDER/standing how others see it. LISTEN is an endpoint, or "-" for none.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from protocol.credentials.records import Address
from protocol.host import Host
from protocol.identity import Identity
from protocol.membership import reachability
from protocol.storage import write_atomically

INTERVAL_S = 0.2

if __name__ == "__main__":
    folder, swarm, name, listen = Path(sys.argv[1]), bytes.fromhex(sys.argv[2]), sys.argv[3], sys.argv[4]
    seeds = [Address.parse(text) for text in sys.argv[5:]]
    reachability.NEXT_ASK_S = 1.0  # who starts first has nobody yet to ask how it is seen
    reachability.DIAL_TIMEOUT_S = 2.0  # in which those whom nobody can dial are dialled back, in vain
    host = Host(Identity.load_or_generate(folder / "identity.key"), swarm, None if listen == "-" else listen, seeds)
    write_atomically(folder / "address", str(host.start()).encode())
    said = 0
    with (folder / "heard").open("a", buffering=1) as heard:
        while True:
            said += 1
            host.publish(f"{name} {said}".encode() + bytes(10_000))
            end = time.monotonic() + INTERVAL_S
            while time.monotonic() < end:
                for item in host.receive(100):
                    heard.write(item.body.rstrip(b"\0").decode() + "\n")
                time.sleep(0.01)
            write_atomically(folder / "rejected", json.dumps(dict(host.counters().rejected)).encode())
            write_atomically(folder / "standing", json.dumps(asdict(host.standing)).encode())
