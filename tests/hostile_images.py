"""Image files as nobody should send them, and uncommon ones that are all right. All of them are small."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

GREY16 = 40_000
"""Of the pixels of the 16-bit image; 156 of 255."""


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *chunks: bytes, depth: int = 1, colour: int = 0, rows: bytes | None = None) -> bytes:
    """A PNG whose pixels are all 0, whatever size it claims."""
    line = 1 + (width * depth + 7) // 8
    packer = zlib.compressobj(9)
    packed = b""
    if rows is None:
        for _ in range(height // 64):
            packed += packer.compress(bytes(64 * line))
        packed += packer.compress(bytes(height % 64 * line))
    else:
        packed = packer.compress(rows)
    packed += packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def saved(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def photo(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


def refused() -> dict[str, bytes]:
    """What must be said to be unreadable, each for a reason of its own."""
    sgi = struct.pack(">HBBHHHHII", 474, 1, 1, 3, 60_000, 60_000, 3, 0, 255).ljust(512, b"\0") + bytes(64)
    dds = b"DDS " + struct.pack("<7I", 124, 0x1007, 60_000, 60_000, 0, 0, 0).ljust(124, b"\0")
    tiff = saved(photo(), "TIFF")
    animated = saved(photo(), "GIF", save_all=True, append_images=[photo()])
    return {
        "bomb.png": png(20_000, 20_000),
        "bomb_claimed.png": png(2**31 - 1, 2**31 - 1, rows=b"\0\0"),
        "bomb.bmp": saved(photo(), "BMP")[:18] + struct.pack("<ii", 100_000, 100_000) + saved(photo(), "BMP")[26:],
        "bomb.gif": animated[:6] + struct.pack("<HH", 65_535, 65_535) + animated[10:],
        "bomb.ppm": b"P6 100000 100000 255\n" + bytes(64),
        "text_bomb.png": png(4, 4, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(4 << 20)))),
        "international_bomb.png": png(4, 4, chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(4 << 20)))),
        "profile_bomb.png": png(4, 4, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(4 << 20))) * 40),
        "narrow.png": png(1, 60_000),
        "flat.png": png(60_000, 1),
        "no_rows.png": png(0, 4, rows=b""),
        "negative.ppm": b"P6 -4 4 255\n" + bytes(64),
        "maxval.ppm": b"P6 4 4 0\n" + bytes(64),
        "wide_maxval.ppm": b"P6 4 4 99999999\n" + bytes(64),
        "digits.ppm": b"P6 " + b"9" * 5000 + b" 4 255\n",
        "plain.ppm": b"P3 4 4 255\n" + b"x" * 64,
        "float.pfm": b"Pf 4 4 nan\n" + bytes(64),
        "big.sgi": sgi,
        "big.dds": dds,
        "icon.ico": saved(photo(), "ICO"),
        "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100000 100000\nshowpage\n",
        "truncated.png": saved(photo(), "PNG")[:120],
        "truncated.jpg": saved(photo(), "JPEG")[:400],
        "truncated.gif": animated[:40],
        "truncated.webp": saved(photo(), "WEBP")[:60],
        "truncated.tiff": tiff[: len(tiff) // 2],
        "only_a_header.png": png(4, 4)[:8],
        "no_pixels.png": png(4, 4, rows=b""),
        "empty.png": b"",
        "text.jpg": b"no image",
        "zeros.jpg": bytes(4096),
    }


def unusual() -> dict[str, bytes]:
    """What is uncommon and all right."""
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = photo().quantize(16)
    return {
        "animated.gif": saved(photo(), "GIF", save_all=True, append_images=[photo("L")]),
        "animated.webp": saved(photo(), "WEBP", save_all=True, append_images=[photo()]),
        "animated.png": saved(photo(), "PNG", save_all=True, append_images=[photo()]),
        "inks.jpg": saved(photo("CMYK"), "JPEG"),
        "inks.tiff": saved(photo("CMYK"), "TIFF"),
        "grey16.png": saved(Image.fromarray(np.full((9, 12), GREY16, np.uint16)), "PNG"),
        "grey16.tiff": saved(Image.fromarray(np.full((9, 12), GREY16, np.uint16)), "TIFF"),
        "grey16.pgm": b"P5 4 4 65535\n" + np.full(16, GREY16, ">u2").tobytes(),
        "float.tiff": saved(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"),
        "wide.tiff": saved(Image.fromarray(np.full((4, 4), 1 << 20, np.int32)), "TIFF"),
        "palette.png": saved(palette, "PNG", transparency=bytes(range(16))),
        "transparent.png": saved(photo("RGBA"), "PNG"),
        "grey_transparent.png": saved(photo("LA"), "PNG"),
        "two_colours.png": saved(photo("1"), "PNG"),
        "lab.tiff": saved(photo("YCbCr"), "TIFF"),
        "turned.jpg": saved(photo(), "JPEG", exif=exif),
        "wrong_name.png": saved(photo(), "JPEG"),
        "pixel.png": saved(photo().crop((0, 0, 1, 1)), "PNG"),
    }


def damaged(count: int = 12) -> dict[str, bytes]:
    """Files of every format with a few bytes changed, which may or may not be readable."""
    generator = np.random.default_rng(1)
    found = {}
    for kind in ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP", "SGI", "DDS", "TGA", "PCX", "ICO", "JPEG2000"):
        whole = saved(photo(), kind)
        for number in range(count):
            content = bytearray(whole)
            for position in generator.integers(0, min(len(content), 200), 4):
                content[position] = int(generator.integers(0, 256))
            found[f"{kind.lower()}{number}.png"] = bytes(content[: int(generator.integers(20, len(content) + 1))])
    return found
