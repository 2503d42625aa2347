"""Main loop of a kernel, from the machine code that cuobjdump prints."""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Instruction:
    """A machine instruction and its control flow."""

    address: int
    opcode: str  # with modifiers: LDG.E.128
    target: int | None  # address that a branch jumps to
    falls_through: bool  # whether the next instruction may follow

    @property
    def num_bytes(self) -> int:
        """Bytes per thread of a load or store of global memory; 0 for other instructions."""
        name, *modifiers = self.opcode.split(".")
        if name not in ("LDG", "STG", "LDGSTS", "LD", "ST"):
            return 0
        widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
        return next((widths[m] for m in modifiers if m in widths), 4)


def parse(listing: str) -> dict[int, Instruction]:
    """{address: instruction} from the output of `cuobjdump --dump-sass` for one kernel."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +(@!?U?P\w+ +)?([A-Z][\w.]*)(.*?);", listing)
    program = {}
    for address, predicate, opcode, operands in lines:
        name = opcode.partition(".")[0]
        if name in ("BRX", "JMX", "JMP"):
            raise ValueError(f"{opcode} at {address}: indirect jumps are not supported")
        target, falls_through = None, True
        if name == "BRA":
            target = int(operands.split()[-1], 16)
            # BRA.U UP0, 0x100 and BRA.DIV UR4, 0x100 depend on their first operand.
            falls_through = bool(predicate) or len(operands.split()) > 1
        elif name in ("EXIT", "RET"):
            falls_through = bool(predicate)
        program[int(address, 16)] = Instruction(int(address, 16), opcode, target, falls_through)
    return program


def main_loop(program: dict[int, Instruction]) -> tuple[list[Instruction], bool]:
    """Returns the instructions of the main loop and True, or of the program and False.

    The main loop is the innermost loop with accesses to global memory that moves most bytes per
    thread. Slow paths in the loop and predicated instructions count once; called functions and NOP
    do not count.
    """
    addresses = sorted(program)
    after = dict(itertools.pairwise(addresses))
    next_of: dict[int, list[int]] = {}
    before: dict[int, list[int]] = {address: [] for address in addresses}
    for address, instruction in program.items():
        successors = [after[address]] if instruction.falls_through and address in after else []
        if instruction.target is not None:
            successors.append(instruction.target)
        next_of[address] = successors
        for successor in successors:
            before[successor].append(address)

    # A backward branch closes a loop if all paths to it contain its target; otherwise it comes from
    # a block that the compiler moved to the end. A branch to itself pads the end of every kernel.
    entry = addresses[0]
    reachable = _reachable(entry, next_of)
    loops: dict[int, set[int]] = {}  # by the first instruction
    for address in reachable:
        target = program[address].target
        if target is None or target >= address:
            continue
        if target == entry or address not in _reachable(entry, next_of, without=target):
            loops.setdefault(target, {target}).update(_reachable(address, before, without=target))

    def bytes_in(loop: Iterable[int]) -> int:
        return sum(program[address].num_bytes for address in loop)

    with_memory = {first: loop for first, loop in loops.items() if bytes_in(loop)}
    innermost = [
        loop
        for first, loop in with_memory.items()
        if not any(other in loop for other in with_memory if other != first)
    ]
    main = max(innermost, key=bytes_in, default=reachable)
    counted = [program[address] for address in sorted(main) if program[address].opcode != "NOP"]
    return counted, bool(innermost)


def _reachable(start: int, edges: dict[int, list[int]], without: int = -1) -> set[int]:
    found, queue = {start}, [start]
    while queue:
        for address in edges[queue.pop()]:
            if address not in found and address != without:
                found.add(address)
                queue.append(address)
    return found
