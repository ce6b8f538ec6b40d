"""Device, format, compiler, and what several processes wait for: on a CPU, the answers of CUDA made up."""

import json
import re
import warnings
from datetime import timedelta

import psutil
import pytest
import torch
import torch.distributed as dist
from conftest import losses

from kit.base import devices, overrides, ranks

CPU, CUDA = torch.device('cpu'), torch.device('cuda', 0)
TOO_OLD = ('The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by '
           'downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx')
NO_DRIVER = ('Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver '
             'from http://www.nvidia.com/Download/index.aspx')
UNEXPECTED = ('Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling '
              'NumCudaDevices() that might have already set an error? Error 804: forward compatibility was attempted '
              'on non supported HW')
BUSY = 'CUDA error: all CUDA-capable devices are busy or unavailable\nCUDA kernel errors might be reported later'


def refuse(words, kind=RuntimeError):
    def raises(*args, **kwargs):
        raise kind(words)
    return raises


@pytest.fixture
def cuda(monkeypatch):
    """cuda(init=..., ...): from here on torch is a build for CUDA 13.0, on a machine with one H100, but for these."""
    def answer(**others):
        answers = {'init': lambda: None, 'device_count': lambda: 1,
                   'set_device': lambda device: None, 'get_device_name': lambda device: 'NVIDIA H100 80GB HBM3',
                   'get_device_capability': lambda device: (9, 0), 'get_arch_list': lambda: ['sm_80', 'sm_90']}
        for name, function in (answers | others).items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(torch.backends.cuda, 'is_built', lambda: True)
        monkeypatch.setattr(torch.version, 'cuda', '13.0')
    precision = torch.get_float32_matmul_precision()
    yield answer
    torch.set_float32_matmul_precision(precision)


# ---------------------------------------------------------------------------------------------------------------------
# which device


def test_a_gpu_that_works_is_taken(cuda, capsys):
    cuda()
    assert devices.choose_device('auto') == CUDA
    assert devices.choose_device('cuda') == CUDA
    assert capsys.readouterr().out == ('device: cuda:0 (a CUDA GPU is here, NVIDIA H100 80GB HBM3)\n'
                                       'device: cuda:0 (as asked, NVIDIA H100 80GB HBM3)\n')


@pytest.mark.parametrize('answers, words', [
    ({'init': refuse(TOO_OLD)},
     ['the driver is too old', 'CUDA up to 11.4', 'built for 13.0', 'nvidia.com', 'pytorch.org']),
    ({'init': refuse(UNEXPECTED)}, ['CUDA does not work here', 'Error 804', 'non supported HW', 'nvidia-smi']),
    ({'init': refuse('CUDA driver initialization failed, you might not have a CUDA gpu.')},
     ['CUDA does not work here', 'initialization failed', 'nvidia-smi']),
    ({'set_device': refuse(BUSY, torch.AcceleratorError)}, ['busy or unavailable);', 'nvidia-smi']),
    ({'init': refuse('')}, ['CUDA does not work here (RuntimeError)']),
    ({'get_device_capability': lambda device: (6, 1), 'get_device_name': lambda device: 'NVIDIA GeForce GTX 1080'},
     ['NVIDIA GeForce GTX 1080', 'compute capability 6.1', 'kernels for sm_80 sm_90 alone', 'pytorch.org']),
])
def test_a_gpu_that_cannot_be_used_is_told_with_the_reason(cuda, capsys, recwarn, answers, words):
    """NVML counts the card (device_count) where CUDA cannot use it."""
    def warns():
        warnings.warn('CUDA initialization: many lines of it', stacklevel=1)
        answers.get('init', lambda: None)()
    cuda(**answers | {'init': warns})
    assert devices.choose_device('auto') == CPU
    out, err = capsys.readouterr()
    assert out.startswith('device: cpu (the GPU is not used: ') and not err
    assert len(out.splitlines()) == 1 and not [word for word in words if word not in out]
    for name, processes in ('cuda', 1), ('cuda:0', 1), ('cuda', 2), ('auto', 2):
        with pytest.raises(SystemExit) as end:
            devices.choose_device(name, 0, processes)
        out, err = capsys.readouterr()
        assert end.value.code == 2 and len(err.splitlines()) == 1 and not out
        assert f'device = {name!r}: ' in err and not [word for word in words if word not in err]
    assert '--device=cpu' in err  # of several processes, which cannot know of each other's GPUs here
    assert not list(recwarn)
    assert devices.choose_device('cpu') == CPU  # and nobody asks for the GPU


@pytest.mark.parametrize('words', [NO_DRIVER, 'No CUDA GPUs are available', 'No HIP GPUs are available'])
def test_where_there_is_no_gpu_nothing_is_wrong(cuda, capsys, words):
    cuda(init=refuse(words))
    assert devices.choose_device('auto') == CPU
    assert capsys.readouterr().out == 'device: cpu (no GPU was found)\n'
    with pytest.raises(SystemExit):
        devices.choose_device('cuda')
    assert 'it is not on this machine (here: 1 cpu)' in capsys.readouterr().err


def test_a_build_for_the_cpu_and_a_run_on_it_never_ask_cuda(cuda, monkeypatch):
    cuda(init=refuse('asked'))
    assert devices.choose_device('cpu') == CPU
    monkeypatch.setattr(torch.backends.cuda, 'is_built', lambda: False)
    assert devices.choose_device('auto') == CPU


def test_more_processes_than_gpus(cuda, capsys):
    cuda()
    assert devices.choose_device('auto', 0, 2) == CUDA
    for name in 'auto', 'cuda':
        with pytest.raises(SystemExit):
            devices.choose_device(name, 1, 2)
        assert 'it is not on this machine (here: 1 cpu, 1 cuda)' in capsys.readouterr().err


@pytest.mark.parametrize('capability, archs, runs', [
    ((8, 9), 'sm_80 sm_86 sm_90', True), ((8, 0), 'sm_86 sm_90', False), ((9, 0), 'sm_80 sm_86', False),
    ((7, 0), 'sm_75 sm_80 sm_90 sm_100 sm_120', False), ((12, 1), 'sm_90 sm_120', True), ((10, 3), 'sm_100', True),
    ((12, 0), 'sm_90 compute_90', True), ((8, 6), 'compute_90', False), ((9, 0), 'sm_90a', True),
    ((10, 3), 'sm_100a', False), ((10, 3), 'sm_100f', True), ((11, 0), 'sm_100f', False),
    ((12, 0), 'compute_90a', False), ((9, 4), 'gfx90a gfx942', True), ((9, 0), '', True),
])
def test_which_kernels_run_on_which_gpu(capability, archs, runs):
    assert devices.has_kernels(*capability, archs.split()) == runs


# ---------------------------------------------------------------------------------------------------------------------
# formats, speed, compiler


@pytest.mark.parametrize('name, tflops', [
    ('NVIDIA H100 80GB HBM3', 989), ('NVIDIA H100 PCIe', 756), ('NVIDIA H100 NVL', 835), ('NVIDIA H200', 989),
    ('NVIDIA H200 NVL', 835), ('NVIDIA GH200 480GB', 989), ('NVIDIA H800', 989), ('NVIDIA H800 PCIe', 756),
    ('NVIDIA H20', 148), ('NVIDIA H20-3e', 148), ('NVIDIA B200', 2250), ('NVIDIA B300 SXM6 AC', 2250),
    ('NVIDIA GB200', 2500), ('NVIDIA GB300', 2500), ('NVIDIA A100-SXM4-80GB', 312), ('NVIDIA A100-PCIE-40GB', 312),
    ('NVIDIA A100 80GB PCIe', 312), ('NVIDIA A800-SXM4-80GB', 312), ('NVIDIA A800 80GB PCIe', 312), ('NVIDIA A30', 165),
    ('NVIDIA A40', 149.7), ('NVIDIA A10', 125), ('NVIDIA A10G', 70), ('NVIDIA RTX A6000', 155), ('NVIDIA L40', 181),
    ('NVIDIA L40S', 362), ('NVIDIA L20', 119.5), ('NVIDIA L4', 121), ('NVIDIA RTX 6000 Ada Generation', 364),
    ('NVIDIA RTX PRO 6000 Blackwell Workstation Edition', 503.8), ('NVIDIA GeForce RTX 5090', 209),
    ('NVIDIA GeForce RTX 5080', 112.6), ('NVIDIA GeForce RTX 4090', 165), ('NVIDIA GeForce RTX 4080', 97.5),
    ('NVIDIA GeForce RTX 3090', 71), ('NVIDIA GeForce RTX 3090 Ti', 80), ('NVIDIA GeForce RTX 3080', 59.5),
    ('Tesla V100-SXM2-16GB', 125), ('Tesla V100-PCIE-16GB', 112), ('Tesla T4', 65),
])
def test_the_peak_of_a_card_by_the_name_that_the_driver_gives(cuda, name, tflops):
    cuda(get_device_name=lambda device: name)
    assert devices.peak_flops.__wrapped__(CUDA, 'bfloat16') == pytest.approx(tflops * 1e12)
    assert devices.peak_flops.__wrapped__(CUDA, 'float32') == pytest.approx(tflops * 1e12 / 2)  # TF32


@pytest.mark.parametrize('name', [
    'NVIDIA H100 80GB HBM3 MIG 1g.10gb', 'NVIDIA A100-SXM4-40GB MIG 3g.20gb', 'NVIDIA A10-4Q', 'GRID A100-1-5C',
    'NVIDIA A100-1-5CME', 'NVIDIA GeForce RTX 4090 Laptop GPU', 'NVIDIA GeForce RTX 4090 D',
    'NVIDIA GeForce RTX 3080 Ti', 'NVIDIA GeForce RTX 4080 SUPER', 'NVIDIA H800 NVL', 'NVIDIA RTX A4000',
    'NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition', 'NVIDIA T400 4GB', 'NVIDIA A100X',
    'Tesla V100S-PCIE-32GB', 'NVIDIA GeForce GTX 1080'])
def test_what_has_the_name_of_a_card_and_not_its_speed_is_measured(cuda, monkeypatch, capsys, name):
    cuda(get_device_name=lambda device: name, synchronize=lambda device: None)
    draw = torch.randn
    monkeypatch.setattr(torch, 'Generator', lambda device: None)
    monkeypatch.setattr(torch, 'randn', lambda *shape, device, dtype, generator: draw(8, 8))
    assert devices.peak_flops.__wrapped__(CUDA, 'bfloat16') > 0
    assert 'measured on a 4096 x 4096 bfloat16 matrix product' in capsys.readouterr().out


@pytest.mark.parametrize('name, device, capability, line', [
    ('float32', CUDA, (8, 0), 'dtype: float32 (as asked; matrix products run in TF32'),
    ('float32', CUDA, (7, 5), 'dtype: float32 (as asked)\n'), ('float32', CPU, None, 'dtype: float32 (as asked)\n'),
    ('auto', CUDA, (8, 0), 'dtype: bfloat16 (this GPU computes in it, and it needs no loss scaling)\n'),
    ('auto', CUDA, (7, 5), 'dtype: float16 (this GPU is too old for bfloat16; the loss is scaled)\n'),
])
def test_float32_that_is_tf32_says_so(cuda, capsys, name, device, capability, line):
    cuda(get_device_capability=lambda device: capability)
    devices.choose_dtype(name, device)
    assert capsys.readouterr().out.startswith(line)


ZEN_3, ZEN_5 = {'architecture': 'x86_64'}, {'architecture': 'x86_64', 'avx512_bf16': True, 'amx_bf16': False}
XEON = {'architecture': 'x86_64', 'amx_bf16': True, 'avx512_fp16': True}
ARM = {'architecture': 'aarch64', 'bf16': True}
IS_SLOW = 'does not compute in it, which takes many times as long; --dtype='


@pytest.mark.parametrize('cpu, name, n_embd, n_tokens, line', [
    (ZEN_5, 'auto', 128, 512, 'bfloat16 (this CPU computes in it; losses are measured in float32)'),
    (XEON, 'auto', 768, 1024, 'bfloat16 (this CPU computes in it; losses are measured in float32)'),
    (ZEN_5, 'auto', 127, 512, 'float32 (this CPU computes in bfloat16 too, which pays from 128 channels and 512'),
    (ZEN_5, 'auto', 128, 511, 'float32 (this CPU computes in bfloat16 too, which pays from 128 channels and 512'),
    (ZEN_3, 'auto', 768, 1024, 'float32 (this CPU has neither AVX512_BF16 nor AMX, with which bfloat16 is faster)'),
    (ARM, 'auto', 768, 1024, 'float32 (this CPU has neither AVX512_BF16 nor AMX'),
    ({}, 'auto', 768, 1024, 'float32 (this CPU has neither'), (ZEN_5, 'auto', 0, 0, 'float32 (the safe choice on cpu)'),
    (ZEN_5, 'bfloat16', 32, 64, 'bfloat16 (as asked)'), (ZEN_5, 'float32', 768, 1024, 'float32 (as asked)'),
    (ZEN_3, 'bfloat16', 768, 1024, f'bfloat16 (as asked; this CPU {IS_SLOW}float32)'),
    (ZEN_5, 'float16', 768, 1024, f'float16 (as asked; this CPU {IS_SLOW}bfloat16)'),
    (XEON, 'float16', 768, 1024, 'float16 (as asked)'), (ARM, 'bfloat16', 768, 1024, 'bfloat16 (as asked)'),
])
def test_the_format_of_a_cpu(monkeypatch, capsys, cpu, name, n_embd, n_tokens, line):
    """By what it computes in, and by what is to be trained; in measures it is always float32."""
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: cpu)
    assert devices.choose_dtype(name, CPU, n_embd=n_embd, n_tokens=n_tokens) == line.split()[0]
    assert devices.choose_dtype(name, CPU, True, n_embd, n_tokens) == 'float32'
    said, measuring = capsys.readouterr().out.splitlines()
    assert said.startswith(f'dtype: {line}') and measuring == 'dtype: float32 (in which all is measured on a CPU)'


@pytest.mark.parametrize('device, name, line', [
    (CPU, 'float32', 'float32 (as the run began; auto would be bfloat16: this CPU computes in it; losses are'),
    (CPU, 'bfloat16', 'bfloat16 (as the run began)'),
    (CPU, 'float16', f'float16 (as the run began; this CPU {IS_SLOW}bfloat16)'),
    (CUDA, 'float32', 'float32 (as the run began; auto would be float16: this GPU is too old for bfloat16; the'),
    (CUDA, 'bfloat16', f'bfloat16 (as the run began; this GPU {IS_SLOW}float16)'),
])
def test_a_resume_says_what_it_would_be_here(cuda, monkeypatch, capsys, device, name, line):
    cuda(get_device_capability=lambda device: (7, 5))
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: ZEN_5)
    kept = dict(n_embd=128, n_tokens=768, is_kept=True)
    assert devices.choose_dtype(name, device, **kept) == name
    assert capsys.readouterr().out.startswith(f'dtype: {line}')
    monkeypatch.setattr(overrides, 'given', {'dtype'})
    assert devices.choose_dtype(name, device, **kept) == name and 'as asked' in capsys.readouterr().out


# a CPU that computes in bfloat16, or one that does not; and a model this small is large enough
MADE_UP_CPU = """
import torch
from kit.base import devices
devices.BFLOAT16_FROM_CHANNELS, devices.BFLOAT16_FROM_TOKENS = 32, 64
torch.cpu.get_capabilities = lambda: {'architecture': 'x86_64', 'avx512_bf16': %s}
"""


def test_what_auto_stood_for_is_stored_and_goes_on_elsewhere(hooked, trained_gpt2, tiny):
    """Losses are those of the same format as asked for, here and on another CPU."""
    new, old = MADE_UP_CPU % True, MADE_UP_CPU % False
    in_config = lambda name: json.loads((tiny / name / 'config.json').read_text())['settings']['dtype']
    in_checkpoint = lambda name: torch.load(tiny / name / 'ckpt.pt', weights_only=True)['config']['dtype']
    whole = losses(hooked(old, '--dtype=bfloat16', '--out_dir=whole', '--max_iters=8', '--lr_decay_iters=8'))
    taken = hooked(new, '--out_dir=a', '--max_iters=5', '--lr_decay_iters=8')
    assert '\ndtype: bfloat16 (this CPU computes in it; ' in taken.out
    assert in_config('a') == in_checkpoint('a') == 'bfloat16'
    gone_on = hooked(old, '--out_dir=a', '--init_from=resume', '--max_iters=8')
    assert f'\ndtype: bfloat16 (as the run began; this CPU {IS_SLOW}float32)\n' in gone_on.out
    assert losses(taken) | losses(gone_on) == whole

    saved = torch.load(trained_gpt2 / 'ckpt.pt', weights_only=True)
    assert saved['config']['dtype'] == 'float32'
    stored_before = saved['config'].keys() - {'threads', 'compile'}
    for name, settings in {  # of an earlier flatGPT; of nanoGPT, which computes in float32 on a CPU
            'earlier': {name: saved['config'][name] for name in stored_before} | {'dtype': 'auto'},
            'nanogpt': {'dataset': 'tiny', 'batch_size': 4, 'dtype': 'float16', 'device': 'cpu'}}.items():
        (tiny / name).mkdir()
        torch.save(saved | {'config': settings}, tiny / name / 'ckpt.pt')
        result = hooked(new, f'--out_dir={name}', '--init_from=resume', '--max_iters=11')
        assert '\ndtype: float32 (as the run began; auto would be bfloat16: ' in result.out, result.err
        assert in_config(name) == 'float32'
    asked = hooked(new, '--init_from=resume', '--max_iters=11', '--dtype=auto')
    assert "Not from the checkpoint: dtype = auto (it has 'float32')\n" in asked.out
    assert '\ndtype: bfloat16 (this CPU computes in it; ' in asked.out and in_checkpoint('checkpoints') == 'bfloat16'


@pytest.mark.parametrize('name, device, flops, mode, reason', [
    ('auto', CUDA, 0.9 * devices.CUDA_GRAPHS_BELOW_FLOPS, 'reduce-overhead', 'CUDA graphs'),
    ('auto', CUDA, 1.1 * devices.CUDA_GRAPHS_BELOW_FLOPS, 'default', 'keeps the GPU busy'),
    ('auto', CPU, 1.0, 'default', 'for CUDA'), ('max-autotune', CUDA, 1.0, 'max-autotune', 'as asked'),
    ('default', CUDA, 1.0, 'default', 'as asked'), ('reduce-overhead', CPU, 1e20, 'reduce-overhead', 'as asked'),
])
def test_the_mode_of_the_compiler(capsys, name, device, flops, mode, reason):
    assert devices.choose_compile_mode(name, device, flops) == mode
    assert re.fullmatch(rf'compile_mode: {mode} \(.*{reason}.*\)\n', capsys.readouterr().out)


def test_no_cuda_graphs_where_gradients_add_up(monkeypatch, capsys):
    """They are lost then (pytorch/pytorch#169545): one line where they are asked for, none taken by itself."""
    for name in 'reduce-overhead', 'max-autotune':
        with pytest.raises(SystemExit) as end:
            devices.choose_compile_mode(name, CUDA, 1e9, micro_steps=2)
        err = capsys.readouterr().err
        assert end.value.code == 2 and name in err and '--compile_mode=default' in err and err.count('\n') == 1
        assert devices.choose_compile_mode(name, CPU, 1e9, micro_steps=2) == name
    assert devices.choose_compile_mode('auto', CUDA, 1e9, micro_steps=2) == 'default'
    monkeypatch.setattr(ranks, 'world_size', 2)
    assert devices.choose_compile_mode('auto', CUDA, 1e9) == 'default'


def test_what_the_setup_leaves_is_settled_where_the_host_runs_ahead(monkeypatch):
    did = []
    for name in 'collect', 'freeze':
        monkeypatch.setattr(devices.gc, name, lambda name=name: did.append(name))
    devices.settle_garbage(CPU)
    assert not did
    devices.settle_garbage(CUDA)
    assert did == ['collect', 'freeze']


@pytest.mark.parametrize('given, kept', [(None, ':4096:8'), (':16:8', ':16:8'), (':0:0', None)])
def test_deterministic_is_strict_and_keeps_what_the_user_has_set(monkeypatch, capsys, given, kept):
    monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', '')  # so that it is put back
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG')
    if given:
        monkeypatch.setenv('CUBLAS_WORKSPACE_CONFIG', given)
    try:
        if kept is None:
            with pytest.raises(SystemExit):
                devices.make_deterministic()
            assert not torch.are_deterministic_algorithms_enabled()
            assert 'CUBLAS_WORKSPACE_CONFIG=:0:0' in (err := capsys.readouterr().err) and 'unset it' in err
        else:
            devices.make_deterministic()
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            assert devices.os.environ['CUBLAS_WORKSPACE_CONFIG'] == kept
            out = capsys.readouterr().out
            assert out.startswith('deterministic: True (') and kept in out and len(out.splitlines()) == 1
    finally:
        torch.use_deterministic_algorithms(False)


# ---------------------------------------------------------------------------------------------------------------------
# figures: a log line ends no run, and waits for nothing that it does not show


class NVMLError(Exception):
    pass


@pytest.mark.parametrize('module, probe, lost', [
    (torch.cuda, 'utilization', ['gpu_percent']), (torch.cuda, 'mem_get_info', ['gpu_used_gib']),
    (torch.cuda, 'memory_allocated', ['gpu_memory_gib']), (torch.cuda, 'max_memory_allocated', ['gpu_peak_gib']),
    (psutil, 'Process', ['cpu_memory_gib']), (psutil, 'virtual_memory', ['cpu_free_gib']),
    (psutil, 'cpu_percent', ['cpu_percent'])])
def test_a_figure_that_cannot_be_had_is_left_out(cuda, monkeypatch, module, probe, lost):
    cuda(utilization=lambda device: 97, mem_get_info=lambda device: (2**30, 3 * 2**30),
         memory_allocated=lambda device: 2**29, max_memory_allocated=lambda device: 2**30)
    figures = devices.usage(CUDA)
    assert {name: value for name, value in figures.items() if 'gpu' in name} == {
        'system/gpu_memory_gib': 0.5, 'system/gpu_peak_gib': 1.0, 'system/gpu_used_gib': 2.0, 'system/gpu_percent': 97}
    assert figures['system/cpu_memory_gib'] > 0 and figures['system/cpu_free_gib'] > 0
    monkeypatch.setattr(module, probe, refuse('Not Supported', NVMLError))
    assert figures.keys() - devices.usage(CUDA).keys() == {f'system/{name}' for name in lost}
    assert not any('gpu' in name for name in devices.usage(CPU))


def test_what_was_fetched_is_there_when_its_copy_is(monkeypatch):
    done = []

    class OnCuda:
        """A tensor on the GPU, whose copies are done when somebody has waited for them."""
        device, shape, dtype = CUDA, torch.Size([2]), torch.float32

        def detach(self):
            return self

    class Pinned:
        def copy_(self, tensor, non_blocking):
            assert isinstance(tensor, OnCuda) and non_blocking
            done.append('copy begun')

    class Event:
        def record(self, stream):
            done.append(f'recorded behind it on {stream}')

        def synchronize(self):
            done.append('waited')

    pinned = Pinned()

    def empty(shape, dtype, pin_memory):
        assert (shape, dtype, pin_memory) == (OnCuda.shape, OnCuda.dtype, True)
        return pinned
    monkeypatch.setattr(torch, 'empty', empty)
    monkeypatch.setattr(torch.cuda, 'Event', Event)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: f'the stream of {device}')
    take = devices.fetch(OnCuda())
    assert done == ['copy begun', 'recorded behind it on the stream of cuda:0']
    assert take() is pinned and done[2:] == ['waited']


def test_on_the_cpu_it_is_there_at_once():
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    fetched = devices.fetch(weight)()
    assert fetched.tolist() == [1.0, 2.0] and not fetched.requires_grad and fetched.data_ptr() == weight.data_ptr()
    assert not devices.runs_ahead(CPU) and not devices.runs_ahead(torch.device('mps')) and devices.runs_ahead(CUDA)


# ---------------------------------------------------------------------------------------------------------------------
# several processes


@pytest.fixture
def calls(monkeypatch):
    """What is asked of torch.distributed in a process that is one of two: [(function, its keywords)]."""
    made = []

    def record(name, result=None):
        def call(*args, **kwargs):
            made.append((name, args, kwargs))
            return result
        monkeypatch.setattr(dist, name, call)
    for name in 'init_process_group', 'barrier', 'destroy_process_group', 'all_reduce':
        record(name)
    groups = iter(['the patient group', 'the group of a step'])
    monkeypatch.setattr(dist, 'new_group', lambda **kwargs: made.append(('new_group', (), kwargs)) or next(groups))
    monkeypatch.setattr(dist, 'TCPStore', lambda *args, **kwargs: 'the store')
    monkeypatch.setattr(dist, 'PrefixStore', lambda prefix, store: store)
    for name in 'reach', 'meet':
        monkeypatch.setattr(ranks.peers, name, lambda *args: None)
    monkeypatch.setattr('sys.excepthook', None)
    monkeypatch.setattr(dist, 'is_nccl_available', lambda: True)
    monkeypatch.setattr(ranks, 'world_size', 2)
    monkeypatch.setattr(ranks, 'rank', 1)
    for group in 'between_hosts', 'in_step':
        monkeypatch.setattr(ranks, group, None)
    for name, value in ('RANK', '1'), ('WORLD_SIZE', '2'), ('MASTER_ADDR', '127.0.0.1'), ('MASTER_PORT', '1'):
        monkeypatch.setenv(name, value)
    return made


@pytest.mark.parametrize('device, backend, minutes', [(CUDA, 'nccl', 25), (CPU, 'gloo', 20)])
def test_ranks_wait_for_hours_over_gloo_and_for_less_in_a_step(calls, monkeypatch, device, backend, minutes):
    """For downloads, uploads and saves of rank 0; in a step the hosts find one that hangs before nccl does."""
    ranks.start('auto', device, 20, dict)
    assert calls[0] == ('init_process_group', (backend,), {
        'store': 'the store', 'rank': 1, 'world_size': 2, 'timeout': timedelta(minutes=minutes),
        'device_id': CUDA if backend == 'nccl' else None})
    made = [kwargs for name, _, kwargs in calls if name == 'new_group']
    assert made == [{'backend': 'gloo', 'timeout': timedelta(hours=12)},
                    {'backend': 'gloo', 'timeout': timedelta(minutes=20)}][:2 if backend == 'nccl' else 1]
    monkeypatch.setattr(ranks.os, '_exit', refuse('left', SystemExit))
    del calls[:]
    ranks.highest(3)
    ranks.wait()
    with pytest.raises(SystemExit):
        ranks.leave()
    in_step = 'the group of a step' if backend == 'nccl' else None  # None: the default group, which is gloo's then
    assert [(name, kwargs.get('group')) for name, _, kwargs in calls] == [
        ('all_reduce', in_step), ('barrier', 'the patient group'), ('barrier', 'the patient group'),
        ('destroy_process_group', None)]
