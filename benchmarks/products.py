"""What one Jacobian product costs by each backend, in plain forward passes; UNet2DModel with attention, d = 1024.

python benchmarks/products.py              # half a minute on two cores
"""

import time

import torch
from top_values import denoiser_at, make_network


def best(run, repeats=3):
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def main():
    network = make_network().eval().requires_grad_(False)
    denoiser, x_t = denoiser_at(network, 400)
    with torch.no_grad():
        plain = best(lambda: network(x_t.expand(32, 1, 32, 32), 400)) / 32
    transposed, forward_mode = denoiser.jacobian(x_t), denoiser.jacobian(x_t)
    forward_mode.forward_backend = "vmap_jvp"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, one forward pass {1e3 * plain:.1f} ms in a stack of 32")
    print("| chunk | reverse | forward, double_vjp | forward, vmap_jvp |")
    print("| --- " * 4 + "|")
    for chunk in (1, 2, 4, 8, 16, 32):
        stack = torch.randn(chunk, 1, 32, 32)
        runs = (lambda: transposed.vjp(stack), lambda: transposed.jvp(stack), lambda: forward_mode.jvp(stack))
        print(f"| {chunk} | {' | '.join(f'{best(run) / chunk / plain:.1f}' for run in runs)} |", flush=True)


if __name__ == "__main__":
    main()
