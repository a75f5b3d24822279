"""A child process for the tests: one host that answers every item "ask X" with "answer X", for ever.

python protocol_node.py FOLDER SWARM_HEX [SEED_ADDRESS]
"""

import sys
import time
from pathlib import Path

from protocol.credentials.records import Address
from protocol.host import Host
from protocol.identity import Identity
from protocol.storage import write_atomically

if __name__ == "__main__":
    folder, swarm = Path(sys.argv[1]), bytes.fromhex(sys.argv[2])
    host = Host(
        Identity.load_or_generate(folder / "identity.key"),
        swarm,
        "tcp://127.0.0.1:0",
        [Address.parse(text) for text in sys.argv[3:]],
        peers_file=folder / "peers.json",
    )
    write_atomically(folder / "address", str(host.start()).encode())
    while True:
        for item in host.receive(100):
            if item.body.startswith(b"ask "):
                host.publish(item.body.replace(b"ask", b"answer", 1))
        time.sleep(0.01)
