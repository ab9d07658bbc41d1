"""The model section of a configuration."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    pattern: str = "dense*4"  # layer kinds from input to output, e.g. "dense*8 memoryllm*16"
    vocab_size: int = 0  # V; 0 takes the vocabulary of the data
    d_model: int = 128  # D
    n_heads: int = 4  # N
    n_kv_heads: int = 0  # K; 0 means N (plain multi-head attention)
    head_dim: int = 0  # H; 0 means D / N
    d_ff: int = 344  # F, width of a dense FFN; flex splits it, stem rows have it
    beta: str = "3"  # flex: FFN-C share in h^2, one number in 0..8 or one per flex layer ("3 2 1")
    ffn_c_kind: str = "swiglu"  # flex: swiglu | square (beta square D x D matrices)
    ffn_c_input: str = "post_attn"  # flex: post_attn | parallel (reads X_L beside attention)
    x0_norm: str = "rmsnorm"  # norm on X_0 before the rows: rmsnorm | layernorm
    x0_norm_shared: bool = False  # one norm for all memory layers instead of one each
    detach_x0: bool = False  # stop the gradient from rows into the token embedding
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    tied_head: bool = False
    init_std: float = 0.02
    table_init_std: float = 0.0  # of learned tables; 0: Xavier-normal over [V, W], as the STEM code
    compute_dtype: str = "float32"  # float32 | bfloat16; parameters are always float32
    attention: str = (
        "auto"  # auto (cudnn on GPU in bfloat16, blocks of queries on a CPU) | xla | cudnn
    )
    scan_layers: bool = True  # scan over the repeating unit; False unrolls, same numbers
    remat: bool = False  # keep only the inputs of each repeating unit for the backward pass, and
    remat_keep: str = ""  # tensors kept beside them, e.g. "attention gate up"; see models/memory.py

    @property
    def head_width(self) -> int:
        """H"""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def kv_heads(self) -> int:
        """K"""
        return self.n_kv_heads or self.n_heads
