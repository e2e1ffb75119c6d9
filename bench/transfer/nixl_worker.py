"""NIXL's POSIX backend under bench_transfer.py, in a Python that has nixl, torch and numpy:

    python nixl_worker.py DIRECTORY LOADS

DIRECTORY holds the store and the file beside it, LOADS is what `transfers` says of the requests.
Answers lines as `transfers` does. One transfer has all requests of a load; how many of them are
under way at a time is the backend's choice.
"""

import ctypes
import json
import mmap
import os
import resource
import sys
import time

# NIXL logs to standard output, which is for answers here. It does so when imported, too.
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

from nixl import nixl_agent, nixl_agent_config  # noqa: E402

FIRST_SLOT = 2 << 20


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    directory, loads = sys.argv[1], json.loads(sys.argv[2])
    agent = nixl_agent("transfers", nixl_agent_config(backends=[]))
    agent.create_backend("POSIX", {"use_uring": "true"})
    requests = {
        name: [int(size) for size, count in load["sizes"].items() for _ in range(count)]
        for name, load in loads.items()
    }
    room = max(sum(sizes) for sizes in requests.values())
    memory = mmap.mmap(-1, room, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory.write(os.urandom(1 << 20) * (room >> 20))
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    read = os.open(f"{directory}/store/blocks", os.O_RDONLY | os.O_DIRECT)
    write = os.open(f"{directory}/plain", os.O_RDWR | os.O_DIRECT)
    length, beside = os.stat(read).st_size, os.stat(write).st_size
    agent.register_memory([(base, room, 0, "")], "DRAM")
    agent.register_memory([(0, length, read, ""), (0, beside, write, "")], "FILE")
    written = 0

    def run(name: str) -> dict:
        nonlocal written
        file, at = (write, written) if name == "write" else (read, FIRST_SLOT)
        dram, disk, place = [], [], 0
        for size in requests[name]:
            dram.append((base + place, size, 0))
            disk.append((at + place, size, file))
            place += size
        if name == "write":
            written = (written + place) % beside
        operation = "WRITE" if name == "write" else "READ"
        ends = [agent.get_xfer_descs(dram, "DRAM"), agent.get_xfer_descs(disk, "FILE")]
        handle = agent.initialize_xfer(operation, *ends, "transfers")
        cpu, start = cpu_seconds(), time.perf_counter()
        state = agent.transfer(handle)
        while state == "PROC":
            time.sleep(1e-4)
            state = agent.check_xfer_state(handle)
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
        if state != "DONE":
            raise SystemExit(f"NIXL: the transfer ended as {state}")
        agent.release_xfer_handle(handle)
        return {"bytes": place, "seconds": seconds, "cpu": cpu}

    print(json.dumps({}), flush=True, file=ANSWERS)
    for line in sys.stdin:
        print(json.dumps(run(line.strip())), flush=True, file=ANSWERS)


if __name__ == "__main__":
    main()
