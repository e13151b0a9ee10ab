import dataclasses
B = lambda v, k, t=1, a=False: C(block=128 * v * k, vector=v, tiles=t, ahead=a)
i8 = [B(16, 1), B(8, 1), B(8, 1, 4, True), B(8, 1, 4), B(8, 1, 16, True), B(16, 1, 4), B(16, 1, 4, True), B(8, 2), B(4, 1, 8, True), B(4, 2, 4)]
f32 = [B(4, 4), B(4, 2), B(4, 2, 4, True), B(4, 4, 4), B(4, 1, 8, True)]
b16 = [B(8, 2), B(8, 1, 4, True), B(8, 1)]
nohash = lambda k, p: p ^ k
odd = lambda c: dataclasses.replace(c, leaves=23)
main([], [("g16int8split", "24", i8), ("f32", "24", f32), ("g16bf16m", "24", b16), ("g16int8split", "125M", [B(16, 1), B(8, 1, 4, True), B(8, 1)])],
     first=[("no hash v16 t1", nohash, "g16int8split", "24", odd(i8[0])), ("no hash v8 t4 ahead", nohash, "g16int8split", "24", odd(i8[2]))])
