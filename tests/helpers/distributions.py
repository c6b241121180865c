"""Builds distributions of a copy of the checkout, and installs them."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

from helpers.paths import ROOT

_BUILD = (
    'import sys; hook, folder = sys.argv[1:]; sys.path.insert(0, "build_tools"); '
    'import backend; getattr(backend, hook)(folder)'
)


def run(*command, cwd, **environment):
    """The output of a program that does not see the checkout."""
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | environment
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=cwd,
        env=env,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def copy_checkout(folder):
    """Copies the sources of distributions to `folder / 'checkout'`."""
    checkout = folder / 'checkout'
    for name in ('flax_densenet', 'configs', 'tests', 'build_tools'):
        ignored = shutil.ignore_patterns('__pycache__', 'data')
        if name != 'tests':
            ignored = shutil.ignore_patterns('__pycache__')
        shutil.copytree(ROOT / name, checkout / name, ignore=ignored)
    names = ('pyproject.toml', 'setup.py', 'README.md', 'LICENSE', 'MANIFEST.in')
    for name in (*names, 'launch.py'):
        shutil.copy(ROOT / name, checkout)
    return checkout


def build(hook, folder, *, cwd, **environment):
    """Runs a hook of the build backend, such as `build_wheel`; returns its output."""
    return run(sys.executable, '-c', _BUILD, hook, folder, cwd=cwd, **environment)


def install(wheel, root):
    """Installs the wheel in a new environment that sees the packages of this one.

    Returns the `bin` folder of the environment.
    """
    run(sys.executable, '-m', 'venv', '--without-pip', root, cwd=root.parent)
    python = root / 'bin' / 'python'
    site = run(
        *(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'),
        cwd=root,
    )
    # A line of a .pth file adds a folder, without the .pth files in it.
    paths = {sysconfig.get_path('purelib'), sysconfig.get_path('platlib')}
    pathlib.Path(site.strip(), 'others.pth').write_text('\n'.join(paths) + '\n')
    pip = (sys.executable, '-m', 'pip', '--python', python)
    run(*pip, 'install', '-q', '--no-deps', '--no-index', wheel, cwd=root)
    return root / 'bin'
