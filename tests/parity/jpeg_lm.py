"""JPEG-LM: the byte codec."""

import numpy as np
from parity.common import fixed

from ar_jax.tokenizers import jpeg


def codec(folder):
    h, io = folder.h, folder.io
    how = {"quality": h["quality"], "subsampling": h["subsampling"]}
    restart, size = h["restart_marker_blocks"], (h["height"], h["width"])
    (encode,) = folder.of("encode")
    fixed(encode.arguments, **how, restart_marker_blocks=restart)
    tokenizer = jpeg.JpegBytes(size, 2**16, restart=restart, **how)
    fixed(h, mcu_size=jpeg.UNITS[h["subsampling"]][0], byte_values=jpeg.CODES - jpeg.FIRST_BYTE)

    image = np.asarray(io["image"])
    stream, tables = jpeg.stream(image, restart=restart, **how), jpeg.tables(**how)
    file = jpeg.assembled(stream, tables)
    (prompt,) = folder.of("prompt prefix")
    rows = int(prompt.arguments["total_patch_rows"] * prompt.arguments["prefix_ratio"])
    (tokens,) = tokenizer.host_encode(image[None])
    assert tokenizer.file(tokens[:, 0]) == file, "the header is put back"
    return {
        "bytes": numbers(stream),
        "tables": numbers(tables),
        "file": numbers(file),
        "decoded": tokenizer.host_decode(tokens[None])[0],
        "restart_markers": jpeg.restart_markers(stream),
        "prefix": numbers(jpeg.prefix(stream, rows)),
        **{
            f"cleaned_{how}": numbers(jpeg.cleaned(np.asarray(io[f"damaged_{how}"]).astype(np.uint8).tobytes()))
            for how in ("trailing", "cut", "headless")
        },
    }


def numbers(stream):
    return np.frombuffer(stream, np.uint8).astype(np.int32)


CASES = {"jpeg_lm_codec": codec}
