"""Runs inside the sandbox: calls a function of an answer with the arguments of each case.

It has no expected values and decides nothing. For each case, in order, it prints the nonce of the
case and the value; the grader outside accepts exactly these lines or nothing. It runs on the
system's interpreter, so it uses nothing newer than Python 3.8, and nothing from phi4.
"""

import json
import os
import sys

_MAX_DEPTH = 200


def is_plain(value, depth=0):
    """Return whether a value is plain JSON: exact types, a tuple for a list, no NaN, no
    infinity."""
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return True
    if kind is float:
        return value == value and value not in (float("inf"), float("-inf"))
    if depth > _MAX_DEPTH:
        return False
    if kind in (list, tuple):
        return all(is_plain(one, depth + 1) for one in value)
    return kind is dict and all(
        type(name) is str and is_plain(one, depth + 1) for name, one in value.items()
    )


def main():
    """Read the request from standard input, reply on standard output."""
    asked = json.load(sys.stdin)
    # The answer's output must not mix with our lines, and the answer must not wait for input.
    channel = os.dup(1)
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    encode, write, leave = json.JSONEncoder().encode, os.write, os._exit
    whoami, us = os.getpid, os.getpid()

    def send(nonce, **said):
        if whoami() != us:
            # The answer may have forked: only one process may reply, otherwise the result is
            # random.
            leave(0)
        rest = (encode(dict(said, nonce=nonce)) + "\n").encode()
        while rest:
            rest = rest[write(channel, rest) :]

    send(asked["nonce"])
    try:
        with open("/program/solution.py", encoding="utf-8") as file:
            source = file.read()
        names = {"__name__": "solution", "exit": sys.exit, "quit": sys.exit}
        exec(compile(source, "solution.py", "exec"), names)
        function = names[asked["function"]]
    except BaseException as error:
        send(asked["nonce"], problem=type(error).__name__ + " while it was loaded")
        leave(0)
    for case in asked["cases"]:
        try:
            value = function(*case["arguments"])
            if is_plain(value):
                send(case["nonce"], value=value)
            else:
                send(case["nonce"], problem="returned no plain value, but " + type(value).__name__)
        except BaseException as error:
            send(case["nonce"], problem="raised " + type(error).__name__)
    leave(0)


if __name__ == "__main__":
    main()
