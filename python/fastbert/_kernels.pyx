# cython: language_level=3, freethreading_compatible=True, boundscheck=False, wraparound=False
"""Binding of kernels.h and dispatch.h, one kernel set at a time, and of threads.h: for tests/ and bench/ only.

Operands are buffers used where they lie (nothing is copied), so that a test chooses their strides, their offset from a
cache line and the pages around them. Shapes are checked here: the kernels themselves cannot fail.
"""

from libc.stdint cimport int8_t, int32_t, uint8_t, uintptr_t

cdef extern from "fastbert.h" nogil:
    ctypedef enum fb_status:
        FB_OK
    ctypedef struct fb_error:
        char text[512]
    ctypedef enum fb_act:
        FB_ACT_NONE, FB_ACT_GELU, FB_ACT_GELU_TANH, FB_ACT_RELU, FB_ACT_SILU, FB_ACT_TANH

cdef extern from "kernels.h" nogil:
    enum: FB_CHAIN
    enum: FB_STRIP
    enum: FB_SPLIT_PANEL
    enum: FB_SPLIT_SCRATCH
    ptrdiff_t fb_k8(ptrdiff_t k)
    ptrdiff_t fb_mix_gain(ptrdiff_t n)
    ctypedef struct fb_epilogue:
        const float *bias
        fb_act act
        const float *residual
        ptrdiff_t ldr
    ctypedef struct fb_gemm_f32:
        const char *name
        size_t (*packed_bytes)(ptrdiff_t n, ptrdiff_t k) noexcept nogil
        void (*pack)(ptrdiff_t n, ptrdiff_t k, const float *w, ptrdiff_t stride_n, ptrdiff_t stride_k,
                     void *packed) noexcept nogil
        void (*run)(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *a, ptrdiff_t lda, const void *packed,
                    const fb_epilogue *epilogue, float *c, ptrdiff_t ldc) noexcept nogil
    ctypedef struct fb_gemm_s8:
        const char *name
        size_t (*packed_bytes)(ptrdiff_t n, ptrdiff_t k) noexcept nogil
        void (*pack)(ptrdiff_t n, ptrdiff_t k, const int8_t *w, ptrdiff_t ldw, const float *scale_w,
                     void *packed) noexcept nogil
        void (*pack_f32)(ptrdiff_t n, ptrdiff_t k, const float *w, ptrdiff_t stride_n, ptrdiff_t stride_k,
                         void *packed) noexcept nogil
        void (*run)(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const uint8_t *a, ptrdiff_t lda, const float *scale_a,
                    const int32_t *zero, const void *packed, const fb_epilogue *epilogue, float *c,
                    ptrdiff_t ldc) noexcept nogil
    ctypedef struct fb_gemm_split:
        const char *name
        size_t (*packed_bytes)(ptrdiff_t n, ptrdiff_t k) noexcept nogil
        void (*pack)(ptrdiff_t n, ptrdiff_t k, const float *w, ptrdiff_t stride_n, ptrdiff_t stride_k,
                     void *packed) noexcept nogil
        void (*run)(ptrdiff_t m, ptrdiff_t n, ptrdiff_t k, const float *a, ptrdiff_t lda, const void *packed,
                    const fb_epilogue *epilogue, float *c, ptrdiff_t ldc, void *scratch) noexcept nogil
    ctypedef struct fb_kernels:
        const char *isa
        const fb_gemm_f32 *gemm_f32
        void (*softmax_f32)(ptrdiff_t rows, ptrdiff_t n, float scale, float *x, ptrdiff_t ldx) noexcept nogil
        void (*softmax_u8)(ptrdiff_t rows, ptrdiff_t n, const float *x, ptrdiff_t ldx, uint8_t *q, ptrdiff_t ldq,
                           float *scale) noexcept nogil
        void (*layernorm_f32)(ptrdiff_t rows, ptrdiff_t n, const float *x, ptrdiff_t ldx, const float *gamma,
                              const float *beta, float eps, float *y, ptrdiff_t ldy) noexcept nogil
        void (*mix_f32)(ptrdiff_t rows, ptrdiff_t n, const float *x, ptrdiff_t ldx, float *y,
                        ptrdiff_t ldy) noexcept nogil
        void (*quantize_u8)(ptrdiff_t rows, ptrdiff_t k, const float *x, ptrdiff_t ldx, uint8_t *q, ptrdiff_t ldq,
                            float *scale, int32_t *zero) noexcept nogil
        void (*mix_quantize_u8)(ptrdiff_t rows, ptrdiff_t k, const float *x, ptrdiff_t ldx, float *y, ptrdiff_t ldy,
                                uint8_t *q, ptrdiff_t ldq, float *scale, int32_t *zero) noexcept nogil
        const fb_gemm_s8 *gemm_s8
        const fb_gemm_split *gemm_split

cdef extern from "dispatch.h" nogil:
    ctypedef struct fb_isa_row:
        const fb_kernels *kernels
        int supported
    int fb_isa_count()
    fb_isa_row fb_isa_at(int index)
    fb_status fb_select_kernels(const char *isa, fb_kernels *merged, fb_error *err)

cdef extern from "threads.h" nogil:
    ctypedef struct fb_team:
        int rank
        int size
    ctypedef void fb_team_fn(const fb_team *team, void *arg) noexcept nogil
    void fb_parallel(int threads, fb_team_fn *fn, void *arg)
    void fb_barrier(const fb_team *team)
    void fb_split(const fb_team *team, ptrdiff_t count, ptrdiff_t step, ptrdiff_t *begin, ptrdiff_t *end)


CHAIN = FB_CHAIN
STRIP = FB_STRIP
SPLIT_PANEL = FB_SPLIT_PANEL
SPLIT_SCRATCH = FB_SPLIT_SCRATCH
ACTS = {
    "none": FB_ACT_NONE,
    "gelu": FB_ACT_GELU,
    "gelu_tanh": FB_ACT_GELU_TANH,
    "relu": FB_ACT_RELU,
    "silu": FB_ACT_SILU,
    "tanh": FB_ACT_TANH,
}


def kernel_sets():
    """The rows of isa.def in this build, best first: (name, this CPU and OS can run it)."""
    return [(fb_isa_at(i).kernels.isa.decode(), fb_isa_at(i).supported != 0) for i in range(fb_isa_count())]


def k8(Py_ssize_t k):
    """Bytes of a row of k quantised elements: k rounded up as kernels.h says."""
    return fb_k8(k)


def mix_gain(Py_ssize_t n):
    """The power of two B of mix_f32, M M = B I, for rows of n elements."""
    return fb_mix_gain(n)


ctypedef fused element:
    float
    int32_t
    int8_t
    uint8_t


cdef Py_ssize_t row_stride(str name, const element[:, :] x, Py_ssize_t rows, Py_ssize_t cols) except -1:
    """Elements between the rows of x [rows][cols]."""
    cdef Py_ssize_t size = sizeof(element)
    if x.shape[0] != rows or x.shape[1] != cols:
        raise ValueError(f"{name}: expected [{rows}, {cols}], got [{x.shape[0]}, {x.shape[1]}]")
    if (cols > 1 and x.strides[1] != size) or (rows > 1 and (x.strides[0] % size or x.strides[0] < size * cols)):
        raise ValueError(f"{name}: expected rows of consecutive elements, got strides {x.strides[0]}, {x.strides[1]}")
    return x.strides[0] // size if rows > 1 else cols


cdef int check_vector(str name, const element[::1] x, Py_ssize_t n) except -1:
    if x.shape[0] != n:
        raise ValueError(f"{name}: expected [{n}], got [{x.shape[0]}]")
    return 0


cdef int check_packed(const unsigned char[::1] packed, size_t expected, Py_ssize_t n, Py_ssize_t k) except -1:
    if <size_t> packed.shape[0] != expected:
        raise ValueError(f"packed: expected {expected} bytes for W [{n}, {k}], got {packed.shape[0]}")
    if expected and <uintptr_t> &packed[0] % 64:
        raise ValueError("packed: expected an address that is a multiple of 64")
    return 0


cdef (Py_ssize_t, Py_ssize_t) pack_strides(const float[:, :] w) except *:
    """Elements between the rows and between the columns of w, one of them 1."""
    cdef Py_ssize_t stride_n = w.strides[0] // 4 if w.shape[0] > 1 else 1
    cdef Py_ssize_t stride_k = w.strides[1] // 4 if w.shape[1] > 1 else 1
    if stride_n != 1 and stride_k != 1:
        raise ValueError(f"w: expected a stride of 4 bytes, got {w.strides[0]} and {w.strides[1]}")
    return stride_n, stride_k


cdef fb_epilogue epilogue_of(const float[::1] bias, str act, const float[:, :] residual, Py_ssize_t m,
                             Py_ssize_t n) except *:
    cdef fb_epilogue epilogue
    epilogue.bias = NULL
    epilogue.act = ACTS[act]
    epilogue.residual = NULL
    epilogue.ldr = 0
    if bias is not None:
        check_vector("bias", bias, n)
        epilogue.bias = &bias[0]
    if residual is not None:
        epilogue.ldr = row_stride("residual", residual, m, n)
        epilogue.residual = &residual[0, 0]
    return epilogue


cdef class KernelSet:
    """What a model runs on when FASTBERT_ISA is `isa`: that row of isa.def, empty slots inherited from the rows below.

    KernelSet() follows the environment, as fb_load does. Raises ValueError: unknown or unsupported name.
    Every operation runs `repeat` times, so that a clock around the call sees little but the kernel.
    """

    cdef fb_kernels k

    def __init__(self, isa=None):
        cdef fb_error err
        cdef const char *name = NULL
        if isa is not None:
            isa = isa.encode()
            name = isa
        if fb_select_kernels(name, &self.k, &err) != FB_OK:
            raise ValueError(err.text.decode())

    @property
    def isa(self):
        return self.k.isa.decode()

    @property
    def gemm_f32_name(self):
        """For example "gemm_f32_8x48_avx512": the register tile is 8 rows by 48 columns."""
        return self.k.gemm_f32.name.decode()

    def packed_bytes(self, Py_ssize_t n, Py_ssize_t k):
        """Bytes of W [n][k] as gemm_f32 wants it."""
        return self.k.gemm_f32.packed_bytes(n, k)

    def pack(self, const float[:, :] w, unsigned char[::1] packed, Py_ssize_t repeat=1):
        """Packs w [n][k], one of its two strides 1 element, into packed [packed_bytes(n, k)], 64-byte aligned."""
        cdef Py_ssize_t n = w.shape[0], k = w.shape[1], stride_n, stride_k, _
        stride_n, stride_k = pack_strides(w)
        check_packed(packed, self.k.gemm_f32.packed_bytes(n, k), n, k)
        with nogil:
            for _ in range(repeat):
                self.k.gemm_f32.pack(n, k, &w[0, 0], stride_n, stride_k, &packed[0])

    def gemm_f32(self, const float[:, :] a, const unsigned char[::1] packed, float[:, :] out, const float[::1] bias=None,
                 str act="none", const float[:, :] residual=None, Py_ssize_t repeat=1):
        """out [m][n] = residual [m][n] + act(a [m][k] * W^T + bias [n]); packed holds W [n][k]; act is a key of ACTS."""
        cdef Py_ssize_t m = a.shape[0], k = a.shape[1], n = out.shape[1], _
        cdef Py_ssize_t lda = row_stride("a", a, m, k), ldc = row_stride("out", out, m, n)
        cdef fb_epilogue epilogue = epilogue_of(bias, act, residual, m, n)
        check_packed(packed, self.k.gemm_f32.packed_bytes(n, k), n, k)
        with nogil:
            for _ in range(repeat):
                self.k.gemm_f32.run(m, n, k, &a[0, 0], lda, &packed[0], &epilogue, &out[0, 0], ldc)

    @property
    def gemm_split_name(self):
        """For example "gemm_split_32x32_amx"; None in a set without one, which has none of the next three either."""
        return None if self.k.gemm_split is NULL else self.k.gemm_split.name.decode()

    def packed_bytes_split(self, Py_ssize_t n, Py_ssize_t k):
        """Bytes of W [n][k] as gemm_split wants it."""
        return self.k.gemm_split.packed_bytes(n, k)

    def pack_split(self, const float[:, :] w, unsigned char[::1] packed, Py_ssize_t repeat=1):
        """Packs w [n][k], one of its two strides 1 element, into packed [packed_bytes_split(n, k)], 64-byte aligned."""
        cdef Py_ssize_t n = w.shape[0], k = w.shape[1], stride_n, stride_k, _
        stride_n, stride_k = pack_strides(w)
        check_packed(packed, self.k.gemm_split.packed_bytes(n, k), n, k)
        with nogil:
            for _ in range(repeat):
                self.k.gemm_split.pack(n, k, &w[0, 0], stride_n, stride_k, &packed[0])

    def gemm_split(self, const float[:, :] a, const unsigned char[::1] packed, float[:, :] out, scratch,
                   const float[::1] bias=None, str act="none", const float[:, :] residual=None, Py_ssize_t repeat=1):
        """As gemm_f32; scratch: SPLIT_SCRATCH bytes, 64-byte aligned."""
        cdef Py_ssize_t m = a.shape[0], k = a.shape[1], n = out.shape[1], _
        cdef Py_ssize_t lda = row_stride("a", a, m, k), ldc = row_stride("out", out, m, n)
        cdef fb_epilogue epilogue = epilogue_of(bias, act, residual, m, n)
        cdef unsigned char[::1] room = scratch
        check_packed(packed, self.k.gemm_split.packed_bytes(n, k), n, k)
        check_packed(room, FB_SPLIT_SCRATCH, n, k)
        with nogil:
            for _ in range(repeat):
                self.k.gemm_split.run(m, n, k, &a[0, 0], lda, &packed[0], &epilogue, &out[0, 0], ldc, &room[0])

    def softmax_f32(self, float[:, :] x, float scale, Py_ssize_t repeat=1):
        """Rows of x [rows][n] become softmax(scale * x), in place; n >= 1."""
        cdef Py_ssize_t ldx = row_stride("x", x, x.shape[0], x.shape[1]), _
        if x.shape[1] < 1:
            raise ValueError("x: expected rows of at least one element")
        with nogil:
            for _ in range(repeat):
                self.k.softmax_f32(x.shape[0], x.shape[1], scale, &x[0, 0], ldx)

    def softmax_u8(self, const float[:, :] x, uint8_t[:, :] q, float[::1] scale, Py_ssize_t repeat=1):
        """softmax(x [rows][n]) ~ scale [rows] * q [rows][k8(n)]; the bytes of q from n on become 0; n >= 1."""
        cdef Py_ssize_t rows = x.shape[0], n = x.shape[1], _
        cdef Py_ssize_t ldx = row_stride("x", x, rows, n), ldq = row_stride("q", q, rows, fb_k8(n))
        check_vector("scale", scale, rows)
        if n < 1:
            raise ValueError("x: expected rows of at least one element")
        with nogil:
            for _ in range(repeat):
                self.k.softmax_u8(rows, n, &x[0, 0], ldx, &q[0, 0], ldq, &scale[0])

    def layernorm_f32(self, const float[:, :] x, const float[::1] gamma, const float[::1] beta, float eps,
                      float[:, :] out, Py_ssize_t repeat=1):
        """out [rows][n] = (x - mean) / sqrt(var + eps) * gamma + beta, row by row; out may be x; n >= 1."""
        cdef Py_ssize_t rows = x.shape[0], n = x.shape[1], _
        cdef Py_ssize_t ldx = row_stride("x", x, rows, n), ldy = row_stride("out", out, rows, n)
        check_vector("gamma", gamma, n)
        check_vector("beta", beta, n)
        if n < 1:
            raise ValueError("x: expected rows of at least one element")
        with nogil:
            for _ in range(repeat):
                self.k.layernorm_f32(rows, n, &x[0, 0], ldx, &gamma[0], &beta[0], eps, &out[0, 0], ldy)

    def mix_f32(self, const float[:, :] x, float[:, :] out, Py_ssize_t repeat=1):
        """out [rows][n] = M x, row by row; out may be x."""
        cdef Py_ssize_t rows = x.shape[0], n = x.shape[1], _
        cdef Py_ssize_t ldx = row_stride("x", x, rows, n), ldy = row_stride("out", out, rows, n)
        with nogil:
            for _ in range(repeat):
                self.k.mix_f32(rows, n, &x[0, 0], ldx, &out[0, 0], ldy)

    def quantize_u8(self, const float[:, :] x, uint8_t[:, :] q, float[::1] scale, int32_t[::1] zero,
                    Py_ssize_t repeat=1):
        """x [rows][k] ~ scale [rows] * (q [rows][k8(k)] - zero [rows]); the bytes of q from k on become 0."""
        cdef Py_ssize_t rows = x.shape[0], k = x.shape[1], _
        cdef Py_ssize_t ldx = row_stride("x", x, rows, k), ldq = row_stride("q", q, rows, fb_k8(k))
        check_vector("scale", scale, rows)
        check_vector("zero", zero, rows)
        with nogil:
            for _ in range(repeat):
                self.k.quantize_u8(rows, k, &x[0, 0], ldx, &q[0, 0], ldq, &scale[0], &zero[0])

    def mix_quantize_u8(self, const float[:, :] x, float[:, :] y, uint8_t[:, :] q, float[::1] scale, int32_t[::1] zero,
                        Py_ssize_t repeat=1):
        """mix_f32 from x to y, which may be x, and quantize_u8 of y."""
        cdef Py_ssize_t rows = x.shape[0], k = x.shape[1], _
        cdef Py_ssize_t ldx = row_stride("x", x, rows, k), ldy = row_stride("y", y, rows, k)
        cdef Py_ssize_t ldq = row_stride("q", q, rows, fb_k8(k))
        check_vector("scale", scale, rows)
        check_vector("zero", zero, rows)
        with nogil:
            for _ in range(repeat):
                self.k.mix_quantize_u8(rows, k, &x[0, 0], ldx, &y[0, 0], ldy, &q[0, 0], ldq, &scale[0], &zero[0])

    @property
    def gemm_s8_name(self):
        """For example "gemm_s8_8x48_avx512vnni": the register tile is 8 rows by 48 columns."""
        return self.k.gemm_s8.name.decode()

    def packed_bytes_s8(self, Py_ssize_t n, Py_ssize_t k):
        """Bytes of W [n][k] and its scales as gemm_s8 wants them."""
        return self.k.gemm_s8.packed_bytes(n, k)

    def pack_s8(self, const int8_t[:, :] w, const float[::1] scale_w, unsigned char[::1] packed, Py_ssize_t repeat=1):
        """Packs w [n][k], -127 .. 127, and scale_w [n] into packed [packed_bytes_s8(n, k)], 64-byte aligned."""
        cdef Py_ssize_t n = w.shape[0], k = w.shape[1], _
        cdef Py_ssize_t ldw = row_stride("w", w, n, k)
        check_vector("scale_w", scale_w, n)
        check_packed(packed, self.k.gemm_s8.packed_bytes(n, k), n, k)
        with nogil:
            for _ in range(repeat):
                self.k.gemm_s8.pack(n, k, &w[0, 0], ldw, &scale_w[0], &packed[0])

    def pack_f32_s8(self, const float[:, :] w, unsigned char[::1] packed, Py_ssize_t repeat=1):
        """Quantises w [n][k], one of its two strides 1 element, and packs it into packed [packed_bytes_s8(n, k)]."""
        cdef Py_ssize_t n = w.shape[0], k = w.shape[1], stride_n, stride_k, _
        stride_n, stride_k = pack_strides(w)
        check_packed(packed, self.k.gemm_s8.packed_bytes(n, k), n, k)
        with nogil:
            for _ in range(repeat):
                self.k.gemm_s8.pack_f32(n, k, &w[0, 0], stride_n, stride_k, &packed[0])

    def gemm_s8(self, const uint8_t[:, :] a, Py_ssize_t k, const float[::1] scale_a, const int32_t[::1] zero,
                const unsigned char[::1] packed, float[:, :] out, const float[::1] bias=None, str act="none",
                const float[:, :] residual=None, Py_ssize_t repeat=1):
        """out [m][n] = residual [m][n] + act(t * scale_a [m] * scale_w [n] + bias [n]), t = (a [m][:k] - zero [m]) * W^T.

        a [m][k8(k)]; packed holds W [n][k] and scale_w; k <= 32768; act is a key of ACTS.
        """
        cdef Py_ssize_t m = a.shape[0], n = out.shape[1], _
        cdef Py_ssize_t lda = row_stride("a", a, m, fb_k8(k)), ldc = row_stride("out", out, m, n)
        cdef fb_epilogue epilogue = epilogue_of(bias, act, residual, m, n)
        if not 0 <= k <= 32768:
            raise ValueError(f"k: expected 0 .. 32768, got {k}")
        check_vector("scale_a", scale_a, m)
        check_vector("zero", zero, m)
        check_packed(packed, self.k.gemm_s8.packed_bytes(n, k), n, k)
        with nogil:
            for _ in range(repeat):
                self.k.gemm_s8.run(m, n, k, &a[0, 0], lda, &scale_a[0], &zero[0], &packed[0], &epilogue, &out[0, 0],
                                   ldc)


# ---- threads.h ----

cdef struct Drill:
    int32_t rounds, nested
    int32_t *calls         # [threads] how often each rank ran
    int32_t *sizes         # [threads] the team size each rank saw
    int32_t *nested_sizes  # [threads] the size of the team that each rank started inside the team
    int32_t *mark          # [threads] the round each rank has reached
    int32_t *late          # [threads] marks of another round that each rank saw behind a barrier


cdef void note_size(const fb_team *team, void *arg) noexcept nogil:
    (<int32_t *> arg)[0] = team.size


cdef void drill(const fb_team *team, void *arg) noexcept nogil:
    cdef Drill *d = <Drill *> arg
    cdef int rank = team.rank, other
    cdef int32_t turn
    d.calls[rank] += 1
    d.sizes[rank] = team.size
    for turn in range(1, d.rounds + 1):
        d.mark[rank] = turn
        fb_barrier(team)
        for other in range(team.size):
            d.late[rank] += d.mark[other] != turn
        fb_barrier(team)
    if d.nested > 0:
        fb_parallel(d.nested, note_size, &d.nested_sizes[rank])


def team_drill(int32_t[:, ::1] log, int32_t rounds=0, int32_t nested=0):
    """Runs a team of at most log.shape[1] threads through `rounds` pairs of barriers.

    log [5][threads] int32, zeros; filled by rank: calls, team size seen, size of a team of `nested` threads started
    inside the team (0: none is started), last round reached, and marks of the wrong round seen behind a barrier. The
    marks are plain memory: only the barrier orders them.
    """
    cdef Drill d
    if log.shape[0] != 5 or log.shape[1] < 1:
        raise ValueError(f"log: expected [5, threads], got [{log.shape[0]}, {log.shape[1]}]")
    d.rounds, d.nested = rounds, nested
    d.calls, d.sizes, d.nested_sizes, d.mark, d.late = &log[0, 0], &log[1, 0], &log[2, 0], &log[3, 0], &log[4, 0]
    with nogil:
        fb_parallel(<int> log.shape[1], drill, &d)


def split(int rank, int size, Py_ssize_t count, Py_ssize_t step):
    """The share (begin, end) of member `rank` of a team of `size`, of `count` units in steps of `step`."""
    cdef fb_team team
    cdef ptrdiff_t begin = 0, end = 0
    team.rank, team.size = rank, size
    fb_split(&team, count, step, &begin, &end)
    return begin, end
