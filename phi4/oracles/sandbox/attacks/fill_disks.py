"""Unlimited files in every place that a program usually may write to."""

got = []
for folder in ("/tmp", "/dev/shm", "/dev", "/", "/program", "/usr"):
    written = 0
    try:
        for number in range(20):
            with open(f"{folder}/x{number}", "wb") as file:
                file.write(bytes(1 << 20))
                written += 1
        got.append(f"{folder} {written} MiB")
    except OSError:
        pass
print(", ".join(got) or "refused")
