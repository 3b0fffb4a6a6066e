"""Ops that run for one member after another, and only they: torch has no batching rule for them.

Torch would loop over the members, too, with a warning, or refuse: it can't loop over ops that take
a list of tensors, nor over ``rrelu``. Where there is a rule for such an op, this is for what the
rule leaves over.

The list is complete for the torch it was made with, and a test says so for the installed one. Left
out are views, ops that write into an ``out=``, backward ops (autograd sits below the member axis),
and ops on other layouts and backends: sparse, quantized, nested, cuDNN, MKL-DNN.
"""

from __future__ import annotations

from typing import Final

BY_MEMBER: Final = frozenset(
    """
    _add_relu.Scalar _add_relu.Tensor _add_relu_.Scalar _add_relu_.Tensor _addmm_activation
    _aminmax _aminmax.dim _cholesky_solve_helper _compute_linear_combination _ctc_loss
    _ctc_loss.Tensor _dirichlet_grad _embedding_bag _embedding_bag_forward_only
    _histogramdd_from_bin_cts _histogramdd_from_bin_tensors _index_put_impl _linalg_eigvals
    _logcumsumexp _masked_scale _masked_softmax _native_batch_norm_legit_no_training
    _native_multi_head_attention _pack_padded_sequence _pad_enum _pad_packed_sequence
    _pdist_forward _standard_gamma_grad _transform_bias_rescale_qkv
    _transformer_encoder_layer_fwd _trilinear _unique _upsample_lanczos2d_aa
    _upsample_lanczos2d_aa.vec _upsample_nearest_exact1d _upsample_nearest_exact1d.vec
    _upsample_nearest_exact2d _upsample_nearest_exact2d.vec _upsample_nearest_exact3d
    _upsample_nearest_exact3d.vec _weight_norm _weight_norm_interface addbmm_ addcdiv_ addcmul_
    addmm.dtype addmm_ addmv_ addr addr_ affine_grid_generator argwhere baddbmm.dtype baddbmm_
    bernoulli.Tensor bilinear bincount bmm.dtype cauchy chain_matmul chalf clamp_ clamp_.Tensor
    clip_ clip_.Tensor conv_tbc ctc_loss.IntList ctc_loss.Tensor cumprod_ cumsum_ diagflat
    div_.Scalar_mode divide_.Scalar embedding_bag embedding_bag.padding_idx embedding_renorm
    embedding_renorm_ eq_.Scalar eq_.Tensor exponential fft_ihfft2 fft_ihfftn fill_diagonal_
    fix_ float_power_.Scalar float_power_.Tensor floor_divide_.Scalar floor_divide_.Tensor
    fmod_.Scalar fmod_.Tensor fractional_max_pool2d fractional_max_pool3d ge_.Scalar ge_.Tensor
    gelu_ geometric greater_.Scalar greater_.Tensor greater_equal_.Scalar greater_equal_.Tensor
    gru.data gru.input gru_cell gt_.Scalar gt_.Tensor heaviside_ histc histogram.bin_ct
    histogram.bins_tensor hypot_ igamma_ igammac_ index_copy_ index_reduce index_reduce_ isclose
    isin.Scalar_Tensor isin.Tensor_Scalar isin.Tensor_Tensor istft kl_div ldexp_ le_.Scalar
    le_.Tensor lerp_.Scalar lerp_.Tensor less_.Scalar less_.Tensor less_equal_.Scalar
    less_equal_.Tensor linalg__powsum linalg_cond.p_str linalg_ldl_solve linalg_lu
    linalg_matrix_rank linalg_matrix_rank.tol_tensor linalg_pinv.rcond_tensor linalg_tensorsolve
    log_normal lstm.data lstm.input lstm_cell lt_.Scalar lt_.Tensor lu_solve margin_ranking_loss
    masked_fill.Tensor masked_fill_.Tensor masked_scatter masked_scatter_ max_unpool2d
    max_unpool3d mm.dtype multi_margin_loss multilabel_margin_loss
    multilabel_margin_loss_forward nanquantile nanquantile.scalar native_channel_shuffle
    native_norm native_norm.ScalarOpt_dim_dtype ne_.Scalar ne_.Tensor negative_ nextafter_
    nll_loss2d_forward nll_loss_forward nonzero_static norm.ScalarOpt_dim_dtype
    norm.ScalarOpt_dtype norm_except_dim not_equal_.Scalar not_equal_.Tensor ormqr pad_sequence
    pdist polygamma_ pow_.Tensor put put_ quantile quantile.scalar rand_like.generator
    randint_like.Tensor randint_like.Tensor_generator randint_like.generator
    randint_like.low_generator_dtype randn_like.generator random random.from random.to
    remainder_.Scalar remainder_.Tensor renorm renorm_ repeat_interleave.Tensor rnn_relu.data
    rnn_relu.input rnn_relu_cell rnn_tanh.data rnn_tanh.input rnn_tanh_cell rrelu rrelu_
    scaled_dot_product_attention scatter_.reduce scatter_.src scatter_.value
    scatter_.value_reduce searchsorted.Scalar segment_reduce soft_margin_loss special_airy_ai
    special_chebyshev_polynomial_t special_chebyshev_polynomial_t.n_scalar
    special_chebyshev_polynomial_t.x_scalar special_chebyshev_polynomial_u
    special_chebyshev_polynomial_u.n_scalar special_chebyshev_polynomial_u.x_scalar
    special_chebyshev_polynomial_v special_chebyshev_polynomial_v.n_scalar
    special_chebyshev_polynomial_v.x_scalar special_chebyshev_polynomial_w
    special_chebyshev_polynomial_w.n_scalar special_chebyshev_polynomial_w.x_scalar
    special_hermite_polynomial_h special_hermite_polynomial_h.n_scalar
    special_hermite_polynomial_h.x_scalar special_hermite_polynomial_he
    special_hermite_polynomial_he.n_scalar special_hermite_polynomial_he.x_scalar
    special_laguerre_polynomial_l special_laguerre_polynomial_l.n_scalar
    special_laguerre_polynomial_l.x_scalar special_legendre_polynomial_p
    special_legendre_polynomial_p.n_scalar special_legendre_polynomial_p.x_scalar
    special_log_ndtr special_shifted_chebyshev_polynomial_t
    special_shifted_chebyshev_polynomial_t.n_scalar
    special_shifted_chebyshev_polynomial_t.x_scalar special_shifted_chebyshev_polynomial_u
    special_shifted_chebyshev_polynomial_u.n_scalar
    special_shifted_chebyshev_polynomial_u.x_scalar special_shifted_chebyshev_polynomial_v
    special_shifted_chebyshev_polynomial_v.n_scalar
    special_shifted_chebyshev_polynomial_v.x_scalar special_shifted_chebyshev_polynomial_w
    special_shifted_chebyshev_polynomial_w.n_scalar
    special_shifted_chebyshev_polynomial_w.x_scalar square_ sspaddmm stft stft.center
    subtract.Scalar subtract_.Scalar subtract_.Tensor take to_padded_tensor tril_
    triplet_margin_loss triu_ uniform vander xlogy_.Scalar_Other xlogy_.Tensor
    """.split()
)
