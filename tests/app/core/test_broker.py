import os
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import cast

from celery import Celery
from redis import Redis

from app.core.broker import CHECK_JOB, CHECKS_QUEUE, CPU_QUEUE, RUN_JOB, Wake, Waker, make_celery, queue_depth, wake
from app.core.settings import Settings
from embedded import valkey
from tests.support.backends import BACKEND, broker_answers
from tests.support.waiting import wait_until
from worker.processes import inherited_environment, kill, start, stop


def test_a_message_carries_one_id_and_nothing_else(broker: Celery) -> None:
    wake(broker, Wake(RUN_JOB, "ftjob-x", CPU_QUEUE))
    with broker.connection_for_read() as connection:
        message = connection.SimpleQueue(CPU_QUEUE).get(timeout=5)
    assert message.headers["task"] == RUN_JOB
    assert message.content_type == "application/json"
    assert message.payload[:2] == [["ftjob-x"], {}]


def test_a_message_that_cannot_be_sent_ends_no_sender(broker: Celery) -> None:
    """Review, S6: an error that no broker raises ended the thread of wake-ups in silence."""
    waker = Waker(broker)
    waker.start()
    waker.soon(Wake(CHECK_JOB, cast(str, object()), CHECKS_QUEUE), Wake(CHECK_JOB, "next", CHECKS_QUEUE))
    wait_until(lambda: queue_depth(broker, CHECKS_QUEUE) == 1, seconds=10)
    waker.stop()


def test_depth_counts_waiting_messages_by_queue(broker: Celery) -> None:
    assert queue_depth(broker, CPU_QUEUE) == 0
    wake(broker, Wake(RUN_JOB, "a", CPU_QUEUE), Wake(RUN_JOB, "b", CPU_QUEUE), Wake(CHECK_JOB, "c", CHECKS_QUEUE))
    assert (queue_depth(broker, CPU_QUEUE), queue_depth(broker, CHECKS_QUEUE)) == (2, 1)


def test_a_broker_that_is_down_raises_nothing_and_works_again_after_its_restart() -> None:
    folder = Path(tempfile.mkdtemp(prefix="it-", dir="/tmp"))
    celery = make_celery(Settings(broker_url=f"redis+socket://{folder / valkey.SOCKET_NAME}"))
    wake(celery, Wake(CHECK_JOB, "lost", CHECKS_QUEUE))
    assert queue_depth(celery, CHECKS_QUEUE) is None
    first = start(valkey.program(folder, folder, inherited_environment()))
    wait_until(lambda: valkey.answers(folder), seconds=10)
    wake(celery, Wake(CHECK_JOB, "kept", CHECKS_QUEUE))
    client = Redis(unix_socket_path=os.fspath(folder / valkey.SOCKET_NAME))
    # on a slow disk a write to the log waits for the sync before it; what a kill loses then, the reaper sends again
    wait_until(lambda: client.info("persistence")["aof_buffer_length"] == 0, seconds=10)
    kill([first])
    wake(celery, Wake(CHECK_JOB, "lost too", CHECKS_QUEUE))
    again = start(valkey.program(folder, folder, inherited_environment()))
    wait_until(lambda: valkey.answers(folder), seconds=10)
    wake(celery, Wake(CHECK_JOB, "new", CHECKS_QUEUE))
    assert queue_depth(celery, CHECKS_QUEUE) == 2
    assert Redis(unix_socket_path=os.fspath(folder / valkey.SOCKET_NAME)).ping()
    stop([again])
    shutil.rmtree(folder)


def test_a_hung_broker_holds_a_sender_for_seconds_and_a_handler_not_at_all() -> None:
    """S6: a broker that takes connections and answers nothing; each call waited for it 30 s and more."""
    folder = Path(tempfile.mkdtemp(prefix="it-", dir="/tmp"))
    settings = Settings.model_validate(BACKEND.broker(folder))
    running = start(BACKEND.broker_program(folder))
    wait_until(lambda: broker_answers(settings), seconds=10)
    celery = make_celery(settings)
    wake(celery, Wake(CHECK_JOB, "first", CHECKS_QUEUE))
    waker = Waker(celery)
    waker.start()
    os.kill(running.process.pid, signal.SIGSTOP)
    try:
        begin = time.monotonic()
        for number in range(3000):
            waker.soon(Wake(CHECK_JOB, str(number), CHECKS_QUEUE))
        assert time.monotonic() - begin < 1.0
        assert not wake(celery, Wake(CHECK_JOB, "lost", CHECKS_QUEUE))
        assert queue_depth(celery, CHECKS_QUEUE) is None
        assert time.monotonic() - begin < 15.0
    finally:
        os.kill(running.process.pid, signal.SIGCONT)
    wait_until(lambda: broker_answers(settings), seconds=10)
    before = queue_depth(celery, CHECKS_QUEUE) or 0
    waker.soon(Wake(CHECK_JOB, "after", CHECKS_QUEUE))
    wait_until(lambda: (queue_depth(celery, CHECKS_QUEUE) or 0) > before, seconds=10)
    waker.stop()
    stop([running])
    shutil.rmtree(folder)
