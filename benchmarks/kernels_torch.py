"""The peers' side of kernels.py. Usage: kernels_torch.py JSON; prints seconds of each convolution as JSON."""

import json
import sys
import time

import torch


def seconds(out: str, shape: list, t: int, n: int, i: int, o: int) -> float:
    """The fastest of some, in the better of torch's two layouts."""
    (height, width), (kh, kw), stride, ((low, high), _) = shape
    assert low == high, "torch pads both sides alike"
    rows, columns = ((side + 2 * low - k) // stride + 1 for side, k in ((height, kh), (width, kw)))
    mask = [out == "x", out == "w", False]
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        like = {"memory_format": layout}
        x = torch.randn(t, n, i, height, width)
        w, y = torch.randn(t, o, i, kh, kw), torch.randn(t, n, o, rows, columns)
        parts = [[a.contiguous(**like) for a in one] for one in zip(x, w, y, strict=True)]

        def run(parts: list = parts) -> None:
            for x, w, y in parts:
                if out == "y":
                    torch.conv2d(x, w, stride=stride, padding=low)
                else:
                    torch.ops.aten.convolution_backward(
                        y, x, w, None, [stride] * 2, [low] * 2, [1, 1], False, [0, 0], 1, mask
                    )

        run()
        for _ in range(7):
            began = time.perf_counter()
            run()
            found.append(time.perf_counter() - began)
    return min(found)


if __name__ == "__main__":
    torch.set_num_threads(2)
    with torch.no_grad():
        print(json.dumps([seconds(*kernel) for kernel in json.loads(sys.argv[1])]))
