# cython: language_level=3, freethreading_compatible=True, binding=True
"""Binding of csrc/fastbert.h: the packed model and its forward pass. Shapes are checked here, once."""

from cpython.object cimport PyObject
from cpython.ref cimport Py_DECREF
from libc.stdint cimport int32_t, int64_t, uint32_t
from libc.stdlib cimport calloc, free

import math
from mmap import mmap

import numpy as np


cdef extern from "Python.h":  # declared so that Cython leaves the exceptions they set alone
    int PyErr_CheckSignals() noexcept
    PyObject *PyObject_CallObject(PyObject *callable, PyObject *args) noexcept


cdef extern from "fastbert.h" nogil:
    ctypedef enum fb_status:
        FB_OK
        FB_EINVAL
        FB_ENOMEM
        FB_ECANCELED
    ctypedef struct fb_error:
        fb_status status
        char text[512]
    ctypedef enum fb_dtype:
        FB_F32
        FB_F16
        FB_BF16
        FB_F64
    ctypedef enum fb_act:
        FB_ACT_NONE
        FB_ACT_GELU
        FB_ACT_GELU_TANH
        FB_ACT_RELU
        FB_ACT_SILU
        FB_ACT_TANH
    ctypedef enum fb_precision:
        FB_FP32
        FB_INT8
    enum:
        FB_POOL_CLS
        FB_POOL_MAX
        FB_POOL_MEAN
        FB_POOL_MEAN_SQRT_LEN
        FB_POOL_WEIGHTED_MEAN
        FB_POOL_LAST
        FB_MAX_DENSE
    ctypedef struct fb_config:
        ptrdiff_t vocab_size, hidden_size, num_hidden_layers, num_attention_heads, intermediate_size
        ptrdiff_t max_position_embeddings, type_vocab_size
        fb_precision precision
        int relaxed
        float layer_norm_eps
        fb_act hidden_act
        int pooling
        int num_dense
        fb_act dense_act[8]
        int normalize
    ctypedef struct fb_tensor:
        const char *name
        const void *data
        fb_dtype dtype
        int rank
        int64_t shape[4]
        const int64_t *strides
        int mapped
    ctypedef struct fb_model:
        pass
    fb_status fb_load(const fb_config *, const fb_tensor *, size_t, const char *, fb_model **, fb_error *)
    void fb_free(fb_model *)
    ctypedef struct fb_info:
        const char *isa
        const char *gemm
        size_t weights_bytes
        ptrdiff_t vector_dim
        int has_pooler
    void fb_get_info(const fb_model *, fb_info *)
    ctypedef struct fb_batch:
        const int32_t *ids
        const int32_t *type_ids
        const int64_t *offsets
        ptrdiff_t size
    ctypedef struct fb_outputs:
        float *hidden
        float *pooler
        float *vectors
    ctypedef struct fb_run_options:
        int threads
        int (*canceled)(void *) noexcept nogil
        void *canceled_arg
    fb_status fb_forward(const fb_model *, const fb_batch *, const fb_outputs *, const fb_run_options *, fb_error *)
    size_t fb_scratch_bytes(const fb_model *, int)
    ctypedef struct fb_head_config:
        const fb_tensor *weight
        const fb_tensor *bias
        fb_act act
        const fb_tensor *gamma
        const fb_tensor *beta
        float layer_norm_eps
    ctypedef struct fb_head:
        pass
    fb_status fb_head_load(const fb_head_config *, const char *, fb_head **, fb_error *)
    void fb_head_free(fb_head *)
    void fb_head_run(const fb_head *, ptrdiff_t, const float *, float *, int)
    fb_status fb_softmax(ptrdiff_t, ptrdiff_t, float *, fb_error *)
    int fb_get_num_threads()
    void fb_set_num_threads(int)
    int fb_usable_threads(int)


cdef extern from "dispatch.h" nogil:
    ctypedef struct fb_kernels:
        const char *isa
    ctypedef struct fb_isa_row:
        const fb_kernels *kernels
        int supported
    int fb_isa_count()
    fb_isa_row fb_isa_at(int)
    fb_status fb_select_kernels(const char *, fb_kernels *, fb_error *)


cdef extern from "crc32c.h" nogil:
    uint32_t fb_crc32c(const void *, size_t)


cdef dict DTYPES = {"F32": FB_F32, "F16": FB_F16, "BF16": FB_BF16, "F64": FB_F64}
cdef dict ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
cdef dict ACTIVATIONS = {
    "none": FB_ACT_NONE, "gelu": FB_ACT_GELU, "gelu_tanh": FB_ACT_GELU_TANH, "relu": FB_ACT_RELU,
    "silu": FB_ACT_SILU, "tanh": FB_ACT_TANH,
}
cdef dict PRECISIONS = {"fp32": FB_FP32, "int8": FB_INT8}
cdef dict POOLINGS = {
    "cls": FB_POOL_CLS, "max": FB_POOL_MAX, "mean": FB_POOL_MEAN, "mean_sqrt_len": FB_POOL_MEAN_SQRT_LEN,
    "weightedmean": FB_POOL_WEIGHTED_MEAN, "lasttoken": FB_POOL_LAST,
}


cdef int raise_status(fb_error *err) except -1:
    text = err.text.decode("utf-8", "replace")
    if err.status == FB_ENOMEM:
        raise MemoryError(text)
    raise ValueError(text)


cdef int lookup(dict table, key, str what) except -1:
    try:
        return table[key]
    except (KeyError, TypeError):
        raise ValueError(f"{what}: expected one of {', '.join(table)}, got {key!r}") from None


cdef int raise_pending() except -1:
    """Lets the exception that between_micro_batches has left set go on."""
    return -1


cdef int between_micro_batches(void *meanwhile) noexcept nogil:
    """Runs Python signal handlers, and once what `meanwhile` points at. What they raise stays set and stops the run."""
    cdef PyObject **pending = <PyObject **>meanwhile
    cdef PyObject *called
    cdef PyObject *result
    with gil:
        if PyErr_CheckSignals() != 0:
            return 1
        if pending[0] is NULL:
            return 0
        called = pending[0]
        pending[0] = NULL
        result = PyObject_CallObject(called, NULL)
        if result is NULL:
            return 1
        Py_DECREF(<object>result)
    return 0


cdef object fill_tensor(fb_tensor *tensor, int64_t *tensor_strides, str name, source):
    """Lets tensor point at source (buffer, dtype, shape[, strides]). Returns what must be kept while it does."""
    data, dtype, shape, *rest = source
    cdef const unsigned char[::1] view = memoryview(data).cast("B") if memoryview(data).nbytes else None
    cdef bytes encoded = name.encode()
    strides = rest[0] if rest else None
    lookup(DTYPES, dtype, name)
    if len(shape) > 4:
        raise ValueError(f"{name}: expected at most 4 dimensions, got {len(shape)}")
    if min(shape, default=1) < 0 or min(strides or (), default=0) < 0 or (
            strides is not None and len(strides) != len(shape)):
        raise ValueError(f"{name}: expected extents from 0 and as many strides, got {list(shape)}, {strides}")
    items = math.prod(shape)
    if strides is not None and items > 0:
        items = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if (0 if view is None else view.shape[0]) != items * ITEM_BYTES[dtype]:
        raise ValueError(f"{name}: expected {items * ITEM_BYTES[dtype]} bytes for {list(shape)} {dtype}, "
                         f"got {memoryview(data).nbytes}")
    tensor.name = encoded
    tensor.data = NULL if view is None else &view[0]
    tensor.dtype = <fb_dtype><int>DTYPES[dtype]
    tensor.rank = len(shape)
    tensor.mapped = view is not None and memoryview(data).readonly and isinstance(memoryview(data).obj, mmap)
    for axis, n in enumerate(shape):
        tensor.shape[axis] = n
    tensor.strides = NULL
    if strides is not None:
        tensor.strides = tensor_strides
        for axis, stride in enumerate(strides):
            tensor_strides[axis] = stride
    return encoded, view


cdef class Model:
    """A packed, read-only encoder; forward() may be called from many threads at once.

    config: the numbers of config.json under their own names, "hidden_act" (none gelu gelu_tanh relu silu tanh),
    "precision" (fp32 int8), "strict" (not relaxed, fastbert.h), "pooling" (names of pooling modes), "dense" (activation names, tensors dense.<i>.weight and .bias), "normalize".
    tensors: name -> (buffer, dtype, shape[, strides]), dtype one of F32 F16 BF16 F64, strides in elements (None: C
    order), names without prefix. The buffers are not needed afterwards. isa: the kernel set; None follows FASTBERT_ISA, else takes the best.
    Raises ValueError naming the entry or tensor and what was expected; MemoryError.
    """

    cdef fb_model *model
    cdef fb_info facts
    cdef readonly Py_ssize_t hidden_size, max_position_embeddings

    def __init__(self, config, tensors, isa=None):
        cdef fb_config c
        cdef fb_error err
        cdef fb_status status
        cdef fb_tensor *table
        cdef int64_t *table_strides
        cdef fb_model *model = NULL
        cdef size_t count = len(tensors), i = 0
        cdef bytes isa_bytes = None if isa is None else isa.encode()
        cdef const char *isa_name = NULL if isa is None else <const char *>isa_bytes
        if self.model is not NULL:
            raise TypeError("Model: is loaded already")
        c.vocab_size = config["vocab_size"]
        c.hidden_size = config["hidden_size"]
        c.num_hidden_layers = config["num_hidden_layers"]
        c.num_attention_heads = config["num_attention_heads"]
        c.intermediate_size = config["intermediate_size"]
        c.max_position_embeddings = config["max_position_embeddings"]
        c.type_vocab_size = config["type_vocab_size"]
        c.precision = <fb_precision>lookup(PRECISIONS, config.get("precision", "fp32"), "precision")
        c.relaxed = not config.get("strict", True)
        c.layer_norm_eps = config["layer_norm_eps"]
        c.hidden_act = <fb_act>lookup(ACTIVATIONS, config["hidden_act"], "hidden_act")
        c.pooling = 0
        for mode in config.get("pooling", ()):
            c.pooling |= lookup(POOLINGS, mode, "pooling")
        dense = config.get("dense", ())
        if len(dense) > FB_MAX_DENSE:
            raise ValueError(f"dense: expected at most {FB_MAX_DENSE} modules, got {len(dense)}")
        c.num_dense = len(dense)
        for position, name in enumerate(dense):
            c.dense_act[position] = <fb_act>lookup(ACTIVATIONS, name, f"dense.{position}")
        c.normalize = bool(config.get("normalize", False))

        table = <fb_tensor *>calloc(count + 1, sizeof(fb_tensor))
        table_strides = <int64_t *>calloc(4 * count + 1, sizeof(int64_t))
        held = []  # the names and views that the table points into
        try:
            if table is NULL or table_strides is NULL:
                raise MemoryError("tensors")
            for name, source in tensors.items():
                held.append(fill_tensor(&table[i], &table_strides[4 * i], name, source))
                i += 1
            with nogil:
                status = fb_load(&c, table, count, isa_name, &model, &err)
        finally:
            free(table)
            free(table_strides)
        if status != FB_OK:
            raise_status(&err)
        self.model = model
        self.hidden_size = c.hidden_size
        self.max_position_embeddings = c.max_position_embeddings
        fb_get_info(self.model, &self.facts)

    def __dealloc__(self):
        fb_free(self.model)

    cdef int check_loaded(self) except -1:
        if self.model is NULL:
            raise TypeError("Model: __init__ was not called")

    @property
    def isa(self):
        """The leading kernel set."""
        self.check_loaded()
        return self.facts.isa.decode()

    @property
    def gemm(self):
        """The GEMM of the linear layers, with its register tile."""
        self.check_loaded()
        return self.facts.gemm.decode()

    @property
    def weights_bytes(self):
        """Bytes of packed weights and tables."""
        return self.facts.weights_bytes

    @property
    def vector_dim(self):
        """Length of a sentence vector; 0 without pooling."""
        return self.facts.vector_dim

    @property
    def has_pooler(self):
        """Whether the checkpoint has pooler.dense."""
        return bool(self.facts.has_pooler)

    def scratch_bytes(self, int threads=0):
        """Bytes of scratch that forward() holds at most; threads=0 is the process default."""
        self.check_loaded()
        return fb_scratch_bytes(self.model, threads)

    def forward(self, const int32_t[::1] ids not None, const int64_t[::1] offsets not None,
                const int32_t[::1] type_ids=None, *, bint hidden=False, bint pooler=False, bint vectors=False,
                int threads=0, meanwhile=None):
        """Runs a ragged batch: ids [tokens] int32, offsets [batch + 1] int64 from 0 to tokens, type_ids [tokens].

        Returns (last_hidden_state [tokens, hidden], pooler_output [batch, hidden], vectors [batch, dim]), float32,
        None where not asked for. The GIL is released; between micro-batches the calling thread runs signal handlers, and
        once `meanwhile()`, while other threads go on.
        Raises ValueError (offsets, lengths, ids out of range), MemoryError, whatever a signal handler or meanwhile raises.
        """
        cdef Py_ssize_t size = offsets.shape[0] - 1, tokens = ids.shape[0]
        cdef fb_batch batch
        cdef fb_outputs out
        cdef fb_run_options options
        cdef fb_error err
        cdef fb_status status
        cdef float[:, ::1] view
        cdef PyObject *pending = NULL if meanwhile is None else <PyObject *>meanwhile
        self.check_loaded()
        if size < 0 or offsets[0] != 0 or offsets[size] != tokens:
            raise ValueError(f"offsets: expected batch + 1 values from 0 to {tokens}")
        for i in range(size):
            if offsets[i] > offsets[i + 1] or offsets[i + 1] > tokens:
                raise ValueError(f"offsets[{i + 1}]: expected {offsets[i]} to {tokens}, got {offsets[i + 1]}")
        if type_ids is not None and type_ids.shape[0] != tokens:
            raise ValueError(f"type_ids: expected [{tokens}], got [{type_ids.shape[0]}]")
        if threads < 0:
            raise ValueError(f"threads: expected 0 or more, got {threads}")
        hidden_array = np.empty((tokens, self.hidden_size), np.float32) if hidden else None
        pooler_array = np.empty((size, self.hidden_size), np.float32) if pooler else None
        vectors_array = np.empty((size, self.facts.vector_dim), np.float32) if vectors else None
        if size > 0:
            batch.ids = &ids[0] if tokens else NULL
            batch.type_ids = NULL if type_ids is None or not tokens else &type_ids[0]
            batch.offsets = &offsets[0]
            batch.size = size
            out.hidden = out.pooler = out.vectors = NULL
            if hidden and tokens:
                view = hidden_array
                out.hidden = &view[0, 0]
            if pooler:
                view = pooler_array
                out.pooler = &view[0, 0]
            if vectors and self.facts.vector_dim > 0:
                view = vectors_array
                out.vectors = &view[0, 0]
            elif vectors:
                raise ValueError("pooling: the model was loaded without one, so there are no sentence vectors")
            options.threads = threads
            options.canceled = between_micro_batches
            options.canceled_arg = &pending
            with nogil:
                status = fb_forward(self.model, &batch, &out, &options, &err)
            if status == FB_ECANCELED:
                raise_pending()
            if status != FB_OK:
                raise_status(&err)
        if pending is not NULL:
            meanwhile()
        return hidden_array, pooler_array, vectors_array


cdef class Linear:
    """A layer of a task head: act(x W^T + bias), then LayerNorm where norm is given; float32, packed once.

    weight [out, in], bias [out] or None, norm (gamma [out], beta [out]) or None: tensors as Model takes them, (buffer,
    dtype, shape); their names in messages are those of names, in this order. act: as hidden_act of Model. A row's result
    has the same bits whatever the other rows are; many threads may use one Linear at once.
    Raises ValueError naming the tensor and what was expected; MemoryError.
    """

    cdef fb_head *head
    cdef readonly Py_ssize_t out_features, in_features

    def __init__(self, weight, bias=None, norm=None, *, act="none", float layer_norm_eps=0,
                 names=("weight", "bias", "gamma", "beta"), isa=None):
        cdef fb_tensor tensors[4]
        cdef int64_t strides[16]
        cdef fb_head_config c
        cdef fb_error err
        cdef fb_status status
        cdef fb_head *head = NULL
        cdef bytes isa_bytes = None if isa is None else isa.encode()
        cdef const char *isa_name = NULL if isa is None else <const char *>isa_bytes
        if self.head is not NULL:
            raise TypeError("Linear: is loaded already")
        gamma, beta = norm or (None, None)
        held = []  # the names and views that the tensors point into
        for i, source in enumerate((weight, bias, gamma, beta)):
            if source is not None:
                held.append(fill_tensor(&tensors[i], &strides[4 * i], names[i], source))
        c.weight = &tensors[0]
        c.bias = NULL if bias is None else &tensors[1]
        c.gamma = NULL if gamma is None else &tensors[2]
        c.beta = NULL if beta is None else &tensors[3]
        c.act = <fb_act>lookup(ACTIVATIONS, act, "act")
        c.layer_norm_eps = layer_norm_eps
        with nogil:
            status = fb_head_load(&c, isa_name, &head, &err)
        if status != FB_OK:
            raise_status(&err)
        self.head = head
        self.out_features, self.in_features = weight[2]

    def __dealloc__(self):
        fb_head_free(self.head)

    def __call__(self, const float[:, ::1] x not None, *, int threads=0):
        """x [rows, in] float32 -> [rows, out] float32. The GIL is released. Raises ValueError for another shape."""
        cdef Py_ssize_t rows = x.shape[0]
        cdef float[:, ::1] y
        if self.head is NULL:
            raise TypeError("Linear: __init__ was not called")
        if x.shape[1] != self.in_features:
            raise ValueError(f"x: expected [rows, {self.in_features}], got [{rows}, {x.shape[1]}]")
        if threads < 0:
            raise ValueError(f"threads: expected 0 or more, got {threads}")
        out = np.empty((rows, self.out_features), np.float32)
        if rows:
            y = out
            with nogil:
                fb_head_run(self.head, rows, &x[0, 0], &y[0, 0], threads)
        return out


def softmax(const float[:, ::1] x not None):
    """The softmax of each row: [rows, n] float32, the same bits on every kernel set and in any batch."""
    cdef fb_error err
    cdef fb_status status = FB_OK
    cdef float[:, ::1] y
    out = np.array(x, np.float32)
    if out.size:
        y = out
        with nogil:
            status = fb_softmax(y.shape[0], y.shape[1], &y[0, 0], &err)
    if status != FB_OK:
        raise_status(&err)
    return out


def crc32c(const unsigned char[::1] data not None):
    """CRC-32C of bytes, as TensorFlow checkpoints have it. The GIL is released."""
    cdef uint32_t crc
    cdef const unsigned char *start = &data[0] if data.shape[0] else NULL
    with nogil:
        crc = fb_crc32c(start, data.shape[0])
    return crc


def isas():
    """The kernel sets of this build, best first: (name, whether this CPU and OS can run it)."""
    return [(fb_isa_at(i).kernels.isa.decode(), bool(fb_isa_at(i).supported)) for i in range(fb_isa_count())]


def select_isa(isa=None):
    """The name of the set that a model would run on now (isa, else FASTBERT_ISA, else the best). ValueError if none."""
    cdef fb_kernels kernels
    cdef fb_error err
    cdef bytes encoded = None if isa is None else isa.encode()
    if fb_select_kernels(NULL if isa is None else <const char *>encoded, &kernels, &err) != FB_OK:
        raise_status(&err)
    return kernels.isa.decode()


def get_num_threads():
    """Threads a call uses unless told otherwise (see csrc/fastbert.h for the order of sources)."""
    return fb_get_num_threads()


def set_num_threads(int threads):
    """Sets the process-wide default number of threads; 0 returns to the environment and the machine."""
    if threads < 0:
        raise ValueError(f"threads: expected 0 or more, got {threads}")
    fb_set_num_threads(threads)


def all_below(values, int64_t end):
    """Whether an array [n] of int32 or int64, contiguous, holds numbers from 0 to below `end` alone."""
    cdef const int32_t[::1] narrow
    cdef const int64_t[::1] wide
    cdef Py_ssize_t i
    if values.dtype.itemsize == 4:
        narrow = values
        for i in range(narrow.shape[0]):
            if not 0 <= narrow[i] < end:
                return False
    else:
        wide = values
        for i in range(wide.shape[0]):
            if not 0 <= wide[i] < end:
                return False
    return True


def usable_threads(int threads=0):
    """`threads`, or get_num_threads() for 0, but no more than the CPUs that this thread may use."""
    return fb_usable_threads(threads)
