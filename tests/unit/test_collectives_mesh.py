"""A mesh whose neighbours are meshes too, all of them polled here: how many links there may be, and none to spare."""

import errno
import os
import socket

import pytest

from collectives.mesh.addresses import Address, listen
from collectives.mesh.handshake import Party, group_key
from collectives.mesh.mesh import Mesh
from collectives.types import Protection
from protocol.identity import Identity
from tests.waiting import wait_until

pytestmark = pytest.mark.slow


@pytest.fixture
def make():
    made = []

    def make_one():
        identity = Identity.generate()
        party = Party(identity, group_key("test"), os.urandom(8), Protection.ENCRYPTED)
        made.append(Mesh(party, Address.parse("tcp://127.0.0.1:0"), 1, lambda *_: None, lambda _: frozenset()))
        return made[-1], identity.node_id

    yield make_one
    for mesh in made:
        mesh.close(0.0)


def poll(meshes, reached):
    """Let all of them work until something is so."""

    def work():
        for mesh in meshes:
            mesh.poll(0.01)
        return reached()

    wait_until(work, 20)


def test_links_with_those_who_are_no_members_are_bounded_and_make_room_when_one_ends(make, monkeypatch):
    monkeypatch.setattr("collectives.mesh.mesh.MAX_LINKS", 1)
    own, node_id = make()
    (first, first_id), (second, second_id), (member, member_id) = make(), make(), make()
    own.enter(frozenset([node_id, member_id]))
    first.want(Address.parse(own.address))
    poll((own, first), lambda: own.linked == {first_id})
    second.want(Address.parse(own.address))
    poll((own, first, second), lambda: own.refused["too_many_links"] and not second.linked)
    assert own.linked == {first_id}
    member.want(Address.parse(own.address))
    poll((own, member), lambda: own.linked == {first_id, member_id})
    own.drop(first_id, "it made way")
    own.drop(member_id, "it made way")
    second.want(Address.parse(own.address))
    poll((own, second), lambda: own.linked == {second_id})


class Full(socket.socket):
    """A listener of a process that has no descriptor left."""

    tries = 0

    def accept(self):
        self.tries += 1
        raise OSError(errno.EMFILE, "Too many open files")


def test_a_connection_that_no_descriptor_is_left_for_does_not_keep_the_thread_busy(make, monkeypatch):
    made = []

    def listen_in_vain(address):
        sock, where = listen(address)
        made.append(Full(fileno=sock.detach()))
        return made[-1], where

    monkeypatch.setattr("collectives.mesh.mesh.listen", listen_in_vain)
    own, _ = make()
    address = Address.parse(own.address)
    with socket.create_connection((address.host, address.port)):
        for _ in range(1000):
            own.poll(0.0)
        assert 1 <= made[0].tries < 500
        wait_until(lambda: own.poll(0.1) or made[0].tries > 1, 10, "it to be tried again")
