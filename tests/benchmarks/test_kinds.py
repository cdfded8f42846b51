"""A step's time by kind of kernel: names as cuBLAS, cuDNN, PyTorch, Inductor and we give them, and a trace of the profiler."""

from collections import Counter

import pytest
import torch
from torch import nn

from fastmae.benchmarks.training import kinds

CUTLASS = "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_nn_align8>(cutlass_80_wmma::Params)"
ADAM = ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
        "FusedOptimizerTensorListMetadata<4>, at::native::(anonymous namespace)::FusedAdamMathFunctor<float, 4, "
        "(at::native::ADAM_MODE)1, false> >")  # fmt: skip
NAMES = {
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_NNT": "products",
    "nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_TNT": "products",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas":
        "products",
    "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn": "products",
    CUTLASS: "products",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, __nv_bfloat16, true>": "products",
    "sm80_xmma_fprop_implicit_gemm_f32f32_tf32f32_f32_nhwckrsc_nchw_tilesize128x128x16_stage4": "products",
    "triton_tem_fused_addmm_3": "products",
    "aten::addmm": "products",
    "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, cutlass::bfloat16_t> >": "attention",
    "void flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<Flash_bwd_kernel_traits<32, cutlass::bfloat16_t> >": "attention",
    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>)": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64_4x1x1_kernel0_0": "attention",
    "void (anonymous namespace)::softmax_warp_forward<c10::Half, float, float, 8, false, false>": "attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "triton_red_fused_add_native_layer_norm_view_4": "norms",
    "triton_per_fused__to_copy_add_native_layer_norm_backward_view_21": "norms",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float, false>": "norms",
    "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float, float, 32, 1>": "norms",
    "triton_poi_fused_gelu_view_7": "GELU",
    "triton_poi_fused_gelu_gelu_backward_view_9": "GELU",
    "triton_red_fused_gelu_gelu_backward_sum_view_12": "bias gradients",
    "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::TensorIteratorBase&)>": "GELU",
    ADAM: "optimizer",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
    "TensorListMetadata<2>, at::native::(anonymous namespace)::CopyFunctor<c10::BFloat16, float, 2, 1, 1>, "
    "at::native::Copy<c10::BFloat16, float> >": "casts",
    "triton_for_fused_6": "other",
    "aten::_fused_adamw_": "optimizer",
    "Memcpy DtoD (Device -> Device)": "copies",
    "Memset (Device)": "copies",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<2u>, unsigned int, 3, 64>":
        "concatenation",
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)>": "copies",
    "void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)>":
        "casts",
    "triton_poi_fused__to_copy_17": "casts",
    "triton_poi_fused__to_copy_cat_permute_view_9": "concatenation",
    "triton_poi_fused_stack_transpose_14": "concatenation",
    "triton_poi_fused_clone_view_3": "copies",
    "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "communication",
    "triton_red_fused_sum_view_30": "bias gradients",
    "triton_per_fused__to_copy_stack_sum_transpose_view_48": "bias gradients",
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::func_wrapper_t<float, at::native::"
    "sum_functor<float, float, float> > > >": "bias gradients",
    "triton_poi_fused_add_mul_2": "other",
    "_short_attention_fwd_kernel": "attention",
    "_add_norm_fwd_kernel": "norms",
    "_add_norm_bwd_kernel": "norms",
    "_gelu_bwd_kernel": "GELU",
    "_masked_mse_fwd_kernel": "fastmae ops",
    "_gather_patches_fwd_kernel": "fastmae ops",
    "_decoder_input_bwd_kernel": "fastmae ops",
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float> > >": "other",
}  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), NAMES.items())
def test_a_kernels_name_tells_its_kind(name, kind):
    assert kinds.kind_of(name) == kind


def test_a_trace_is_summed_over_what_ran_on_the_device():
    events = [{"cat": "kernel", "name": "nvjet_a", "dur": 30.0}, {"cat": "kernel", "name": "nvjet_a", "dur": 50.0},
              {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "dur": 20.0},
              {"cat": "gpu_user_annotation", "name": "Optimizer.step#AdamW.step", "dur": 900.0},
              {"cat": "cpu_op", "name": "aten::mm", "dur": 500.0}, {"ph": "M", "name": "process_name"}]  # fmt: skip
    times, launches = kinds.kernels_of({"traceEvents": events})
    found = kinds.summed(times, launches, calls=2)
    assert found["kinds"]["products"] == {"microseconds": 40.0, "launches": 1.0, "share": 0.8}
    assert found["kinds"]["copies"] == {"microseconds": 10.0, "launches": 0.5, "share": 0.2}
    assert found["kinds"]["optimizer"]["launches"] == 0
    assert found["kernels"][0] == {"name": "nvjet_a", "kind": "products", "microseconds": 40.0, "launches": 1.0}


def test_a_steps_time_is_told_by_kind_on_a_cpu():
    layers = nn.Sequential(nn.Linear(96, 96), nn.LayerNorm(96), nn.GELU())
    optimizer = torch.optim.AdamW(layers.parameters(), fused=True)

    def step():
        layers(torch.ones(512, 96)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    found = kinds.profile_calls(step, torch.device("cpu"), 3)
    assert all(found["kinds"][kind]["microseconds"] > 0 for kind in ("products", "norms", "GELU", "optimizer"))
    assert found["kinds"]["optimizer"]["launches"] >= 1 and found["busy"] > 0
    assert sum(kind["share"] for kind in found["kinds"].values()) == pytest.approx(1)
    section = {"rows": [found | {"contender": "fastmae", "model": "tiny", "batch": 512}]}
    lines = kinds.table(section)
    assert [line[0] for line in lines[1:-1]] == list(kinds.KINDS) and lines[0][1] == "fastmae, tiny, batch 512"


@pytest.mark.gpu
@pytest.mark.worth(2)
def test_a_products_time_is_found_on_a_gpu():
    a = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    found = kinds.profile_calls(lambda: a @ a, torch.device("cuda"), 10)
    assert found["kinds"]["products"]["share"] > 0.9 and found["kinds"]["products"]["launches"] >= 1
    assert 0.3 < found["busy"] < 1.5
    assert Counter(k["kind"] for k in found["kernels"])["products"] >= 1
