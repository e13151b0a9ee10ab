B = lambda v, k, t=1, a=False: C(block=128 * v * k, vector=v, tiles=t, ahead=a)
grid = [B(16, 1), B(8, 1), B(8, 1, 4), B(8, 1, 4, True), B(8, 1, 8, True), B(8, 2), B(8, 2, 4), B(16, 1, 2), B(16, 1, 4), B(16, 1, 4, True), B(4, 2, 4, True), B(4, 2, 1), B(4, 1, 8, True), B(8, 1, 16, True), B(8, 1, 16)]
f32 = [B(4, 4), B(4, 2), B(4, 2, 4), B(4, 2, 4, True), B(4, 1, 8, True), B(4, 4, 4), B(4, 1, 8)]
b16 = [B(8, 2), B(8, 1), B(8, 1, 4, True), B(8, 1, 4)]
main([("g16int8split", *A, None), ("g16int8split", *A, B(8, 1, 4, True)), ("g16int8split", *A, B(8, 1, 4)), ("f32", *A, None), ("f32", *A, B(4, 1, 8, True)), ("g16int8split", *L, B(8, 1, 4, True))],
     [("g16int8split", "24", grid), ("f32", "24", f32), ("g16bf16m", "24", b16), ("g16int8split", "125M", [B(16, 1), B(8, 1), B(8, 1, 4, True)]), ("f32", "125M", [None])])
