"""The files of deploy/, by their own linters, and that they fit launch.py."""

import pathlib
import re
import subprocess
import sys

import pytest

from helpers.paths import ROOT

DEPLOY = ROOT / 'deploy'


def lint(name, *arguments):
    program = pathlib.Path(sys.executable).parent / name
    if not program.exists():
        pytest.skip(f'{name} is not installed here')
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_slurm_by_shellcheck():
    lint('shellcheck', DEPLOY / 'slurm.sbatch', ROOT / '.ci' / 'run')


def test_dockerfile_by_hadolint():
    lint('hadolint', DEPLOY / 'Dockerfile')


def test_kubernetes_by_its_schemas():
    lint('kubernetes-validate', '--strict', DEPLOY / 'kubernetes.yaml')


@pytest.fixture
def documents():
    yaml = pytest.importorskip('yaml')
    return list(yaml.safe_load_all((DEPLOY / 'kubernetes.yaml').read_text()))


def test_kubernetes_names_and_numbers_agree(documents):
    service, job = documents
    name, spec = job['metadata']['name'], job['spec']
    pod = spec['template']['spec']
    assert service['spec']['selector'] == {'job-name': name}
    assert pod['subdomain'] == service['metadata']['name']
    args = pod['containers'][0]['args']
    flags = dict(arg.lstrip('-').split('=', 1) for arg in args if '=' in arg)
    assert spec['completions'] == spec['parallelism'] == int(flags['num_processes'])
    host, port = flags['coordinator_address'].split(':')
    assert host == f'{name}-0.{pod["subdomain"]}'
    assert int(port) == service['spec']['ports'][0]['port']
    gpus = int(pod['containers'][0]['resources']['limits']['nvidia.com/gpu'])
    assert int(flags['config.data.batch_size']) % (gpus * spec['completions']) == 0


def test_launch_knows_the_flags(documents):
    """Parsed by launch.py itself, as process 3 of the job gets them."""
    args = documents[1]['spec']['template']['spec']['containers'][0]['args']
    args = [arg.replace('$(JOB_COMPLETION_INDEX)', '3') for arg in args]
    code = (
        'import sys; from flax_densenet.cli import command_line, commands; '
        'print(command_line.parse(sys.argv, commands.COMMANDS).workdir)'
    )
    done = subprocess.run(
        [sys.executable, '-c', code, *args], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == '/ckpt/photos\n', done.stderr


def test_image_holds_what_it_copies():
    """What the Dockerfile copies exists, and .dockerignore lets it through."""
    text = (DEPLOY / 'Dockerfile').read_text()
    copied = [
        n for line in re.findall(r'^COPY (.*) \S+$', text, re.M) for n in line.split()
    ]
    let_through = (ROOT / '.dockerignore').read_text()
    assert {'pyproject.toml', 'flax_densenet', 'launch.py', 'configs'} <= set(copied)
    assert {'setup.py', 'MANIFEST.in', 'build_tools'} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists() and f'\n!{name}\n' in let_through
    extras = re.findall(r'extras=([\w,]+)', text)
    project = (ROOT / 'pyproject.toml').read_text()
    for extra in {name for group in extras for name in group.split(',')}:
        assert f'\n{extra} = [' in project
