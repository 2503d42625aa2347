"""What a kernel does in its main loop, from the machine code that cuobjdump prints."""

import itertools
import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Instruction:
    """One machine instruction, and where the program may go from it."""

    address: int
    opcode: str  # with its modifiers: LDG.E.128
    target: int | None  # of a branch
    falls_through: bool  # the next instruction may follow

    @property
    def num_bytes(self) -> int:
        """That it loads from or stores to global memory, per thread; 0 for all others."""
        name, *modifiers = self.opcode.split(".")
        if name not in ("LDG", "STG", "LDGSTS", "LD", "ST"):
            return 0
        widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
        return next((widths[m] for m in modifiers if m in widths), 4)


def parse(listing: str) -> dict[int, Instruction]:
    """{address: instruction} of what `cuobjdump --dump-sass` prints of one kernel."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +(@!?U?P\w+ +)?([A-Z][\w.]*)(.*?);", listing)
    program = {}
    for address, predicate, opcode, operands in lines:
        name = opcode.partition(".")[0]
        if name in ("BRX", "JMX", "JMP"):
            raise ValueError(f"{opcode} at {address}: indirect jumps are not followed")
        target, falls_through = None, True
        if name == "BRA":
            target = int(operands.split()[-1], 16)
            # BRA.U UP0, 0x100 and BRA.DIV UR4, 0x100 depend on their first operand.
            falls_through = bool(predicate) or len(operands.split()) > 1
        elif name in ("EXIT", "RET"):
            falls_through = bool(predicate)
        place = int(address, 16)
        program[place] = Instruction(place, opcode, target, falls_through)
    return program


def main_loop(program: dict[int, Instruction]) -> tuple[list[Instruction], bool]:
    """(the instructions of the main loop, True), or (all of the program, False).

    That is, of the loops that move global memory and hold no other such loop, the one that moves
    most bytes per thread. Slow paths that a loop may take and predicated instructions count once;
    functions that are called, and NOP, not at all.
    """
    addresses = sorted(program)
    following = dict(itertools.pairwise(addresses))
    next_of: dict[int, list[int]] = {}
    before: dict[int, list[int]] = {address: [] for address in addresses}
    for address, instruction in program.items():
        places = [following[address]] if instruction.falls_through and address in following else []
        if instruction.target is not None:
            places.append(instruction.target)
        next_of[address] = places
        for place in places:
            before[place].append(address)

    # A branch backwards closes a loop if all ways to it pass its target; else it comes from a block
    # that the compiler put behind the others. One to itself pads the end of every kernel.
    entry = addresses[0]
    everything = _reachable(entry, next_of)
    loops: dict[int, set[int]] = {}  # by their first instruction
    for address in everything:
        target = program[address].target
        if target is None or target >= address:
            continue
        if target == entry or address not in _reachable(entry, next_of, without=target):
            loops.setdefault(target, {target}).update(_reachable(address, before, without=target))

    def bytes_in(places: Iterable[int]) -> int:
        return sum(program[place].num_bytes for place in places)

    moving = {first: places for first, places in loops.items() if bytes_in(places)}
    innermost = [
        places
        for first, places in moving.items()
        if not any(other in places for other in moving if other != first)
    ]
    chosen = max(innermost, key=bytes_in, default=everything)
    kept = [program[place] for place in sorted(chosen) if program[place].opcode != "NOP"]
    return kept, bool(innermost)


def _reachable(start: int, edges: dict[int, list[int]], without: int = -1) -> set[int]:
    found, waiting = {start}, [start]
    while waiting:
        for place in edges[waiting.pop()]:
            if place not in found and place != without:
                found.add(place)
                waiting.append(place)
    return found
