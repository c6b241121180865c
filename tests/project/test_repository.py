"""Files at the top of the repository: workflows, citation, changelog, README."""

import re

import pytest
import yaml

from flax_densenet import __version__
from helpers import lazy
from helpers.paths import ROOT

check_jsonschema = lazy.module('check_jsonschema')

WORKFLOWS = sorted((ROOT / '.github' / 'workflows').glob('*.yml'))


@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda path: path.name)
def test_workflows_have_the_form_that_github_reads(path):
    arguments = ['--builtin-schema', 'vendor.github-workflows', str(path)]
    with pytest.raises(SystemExit) as done:
        check_jsonschema.main(arguments)
    assert done.value.code == 0


@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda path: path.name)
def test_workflows_call_targets_of_the_makefile(path):
    targets = re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.M)
    jobs = yaml.safe_load(path.read_text())['jobs']
    commands = [
        step['run']
        for job in jobs.values()
        for step in job.get('steps', [])
        if step.get('run', '').startswith('make ')
    ]
    assert commands or path.name == 'publish.yml'
    for command in commands:
        assert command.split()[1] in targets, command


def test_versions_agree():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['version'] == __version__
    assert f'## {__version__}' in (ROOT / 'CHANGELOG.md').read_text()


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = (ROOT / 'README.md').read_text()
    assert len(text.splitlines()) <= 160
    links = re.findall(r'\]\(([^)#]+)[^)]*\)|(?:src|srcset)="([^"]+)"', text)
    local = [a or b for a, b in links if not (a or b).startswith('http')]
    assert len(local) > 20
    for link in local:
        assert (ROOT / link).exists(), link
