'use strict';
const palette = ['#1f77b4', '#d95f02', '#2a9d6f', '#b5478f', '#8c6d1f', '#6a5acd', '#c0392b', '#17889b', '#7f7f7f', '#557a1f'];
const of = place => () => palette[place % palette.length];

// Test and training of every run; a run's two curves come and go together.
function both(name, change) {
  return charts.runs.flatMap((run, place) => ['test', 'train'].map(part => ({
    name: part === 'test' ? run.name : run.name + ', training', group: run.name, unnamed: part === 'train',
    x: run.curves.epoch, y: change(run.curves[part + '_' + name]), color: of(place),
    dash: part === 'test' ? 'solid' : 'dash',
  })));
}

curves('accuracy', both('accuracy', percent), null, 'accuracy, %', { unit: ' %' });
curves('loss', both('loss', values => values), null, 'cross-entropy', {});
curves('rate', charts.runs.map((run, place) => ({
  name: run.name, x: run.curves.epoch, y: run.curves.learning_rate, color: of(place),
})), null, 'learning rate', { layout: { yaxis: rateAxis(charts.runs.map(run => run.curves.learning_rate)) } });
