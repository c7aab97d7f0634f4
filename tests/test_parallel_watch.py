"""Processes meet and watch each other; here each is a thread, and what ends a process raises."""

import concurrent.futures
import contextlib
import queue
import socket
import threading
import time

import pytest
from fixtures.multi_host import free_port

from mistral_eqx.parallel import watch as watch_module
from mistral_eqx.parallel.watch import address, meet


@pytest.fixture
def together():
    """Lets several processes meet, and gives the watch of each, or its sentence."""
    made = []

    def together(*processes, timeout=10.0):
        coordinator = f"localhost:{free_port()}"

        def one(count, number):
            try:
                made.append(meet(coordinator, count, number, timeout))
                return made[-1]
            except ValueError as error:
                return str(error)

        with concurrent.futures.ThreadPoolExecutor() as pool:
            return list(pool.map(one, *zip(*processes, strict=True)))

    yield together
    for watch in made:
        for connection in watch._peers.values():
            connection.close()


class Ended(Exception):
    pass


@pytest.fixture
def ended(monkeypatch):
    """What would have ended this process, and what it wrote to stderr, in place of doing so."""
    found = {"codes": queue.SimpleQueue(), "said": []}

    def leave(code):
        found["codes"].put(code)
        raise Ended

    def write(descriptor, text):
        assert descriptor == 2
        found["said"].append(text.decode())

    monkeypatch.setattr(watch_module, "_exit", leave)
    monkeypatch.setattr(watch_module.os, "write", write)
    # It keeps a lock until the process ends.
    monkeypatch.setattr(watch_module.interrupts, "undo_all", lambda: None)
    monkeypatch.setattr(watch_module, "_GRACE", 0.05)
    # The threads end by an exception where processes would end.
    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    return found


def test_processes_meet_and_process_0_broadcasts_texts(together):
    watches = together((3, 2), (3, 0), (3, 1))
    for watch in watches:
        watch.start()
    assert [watch.process for watch in watches] == [2, 0, 1]
    assert {watch.processes for watch in watches} == {3}
    texts = ["line\nline", None, "ü" * 100_000]
    assert [watches[1].broadcast(text) for text in texts] == texts
    for watch in (watches[0], watches[2]):
        assert [watch.broadcast("not this one") for _ in texts] == texts
    for watch in watches:
        watch.end()


def test_one_process_needs_nobody():
    watch = meet(f"localhost:{free_port()}", 1, 0, 1.0)
    watch.start()
    assert watch.broadcast("text") == "text"
    watch.end()


def test_who_does_not_come_is_named_to_those_who_did(together):
    found = together((4, 0), (4, 2), timeout=2.0)
    assert len(set(found)) == 1
    assert "Of 4 processes, number 1, 3 did not connect to the coordinator" in found[0]


def test_without_process_0_its_address_is_named(together):
    (sentence,) = together((2, 1), timeout=0.3)
    assert sentence.startswith("Process 0 was not found at the coordinator 'localhost:")
    assert "(Connection refused)" in sentence


@pytest.mark.parametrize(
    ("processes", "sentence"),
    [
        ([(2, 0), (3, 1)], "Process 1 was started for 3 processes and process 0 for 2"),
        ([(3, 0), (3, 1), (3, 1)], "Two processes have the number 1"),
    ],
)
def test_processes_that_are_not_numbered_alike_are_refused_on_all(together, processes, sentence):
    found = together(*processes)
    assert len(set(found)) == 1
    assert found[0].startswith(sentence)


def test_another_release_of_jax_is_refused_on_all(together, monkeypatch):
    versions = {0: "jax 1", 1: "jax 2"}
    names = iter(versions.values())
    monkeypatch.setattr(watch_module, "_version", lambda: next(names, "jax 1"))
    found = together((2, 0), (2, 1))
    assert all("Process 1 has jax" in str(sentence) for sentence in found)


def test_a_stranger_at_the_door_does_not_disturb(together):
    def knock(port, stop):
        while not stop.is_set():
            with contextlib.suppress(OSError), socket.create_connection(("localhost", port), timeout=1) as connection:
                connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
            time.sleep(0.01)

    port, stop = free_port(), threading.Event()
    thread = threading.Thread(target=knock, args=(port, stop))
    thread.start()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(meet, f"localhost:{port}", 2, 0, 10.0)
        time.sleep(0.1)
        second = pool.submit(meet, f"localhost:{port}", 2, 1, 10.0)
        watches = [first.result(), second.result()]
    stop.set()
    thread.join()
    for watch in watches:
        watch.start()
    assert watches[0].broadcast("text") == watches[1].broadcast(None) == "text"
    for watch in watches:
        watch.end()
        watch._peers[1 - watch.process].close()


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"cannot listen at port {port} of the coordinator 'localhost:{port}'"):
            meet(f"localhost:{port}", 2, 0, 1.0)


def test_a_process_that_is_gone_ends_the_others(together, ended):
    first, second = together((2, 0), (2, 1))
    first.start()
    second._peers[0].shutdown(socket.SHUT_RDWR)
    assert ended["codes"].get(timeout=10) == 1
    assert ended["said"] == [
        "Error: Process 1 is gone, so process 0 ends too; it was killed, or its machine or the network failed.\n"
    ]


def test_a_process_that_fails_says_so_to_the_others(together, ended):
    first, second = together((2, 0), (2, 1))
    first.start()
    with pytest.raises(Ended):
        second.leave(2)
    assert [ended["codes"].get(timeout=10) for _ in range(2)] == [2, 1]
    assert ended["said"] == ["Error: Process 1 has failed, so process 0 ends too; the error of process 1 says why.\n"]


def test_a_process_that_has_ended_is_not_missed(together, ended):
    first, second = together((2, 0), (2, 1))
    first.start()
    second.end()
    second._peers[0].shutdown(socket.SHUT_RDWR)
    for thread in first._threads:
        thread.join(5)
    assert ended["codes"].empty()
    assert ended["said"] == []


def test_an_address_may_be_of_either_version_of_the_internet_protocol():
    assert address("10.0.0.1:8476") == ("10.0.0.1", 8476)
    assert address("[2001:db8::1]:8476") == ("2001:db8::1", 8476)
    assert address("node-7.cluster:1") == ("node-7.cluster", 1)
