"""A data card as a page that needs no other file."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment

from steps.cards.numbers import QUANTILES

_ENVIRONMENT = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.filters |= {
    "count": lambda number: f"{number:,}",
    "percent": lambda share: f"{100 * share:.2f} %",
    "rule": lambda rule: "; ".join(f"{name}: {_words(value)}" for name, value in rule.items()),
}
_PAGE = _ENVIRONMENT.from_string(
    """{% macro facts(rows) %}
<table>
{% for name, value in rows %}<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table>
{% endmacro %}
{% macro link(url, text) %}<a href="{{ url }}" rel="noreferrer">{{ text or url }}</a>{% endmacro %}
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}: data card</title>
<style>
:root { color-scheme: light dark; --line: #ddd; --faint: #666 }
@media (prefers-color-scheme: dark) { :root { --line: #444; --faint: #aaa } }
body { font-family: sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
td, th { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left; font-weight: normal }
thead th { font-weight: bold } td { font-variant-numeric: tabular-nums } svg { width: 100%; height: auto }
p.note, footer { color: var(--faint) } code { overflow-wrap: anywhere }
</style></head><body>
<h1>{{ title }}</h1>
<p>Data set <code>{{ dataset }}</code>
{%- if variant_of %}, a variant of <code>{{ variant_of }}</code> with the same files{% endif %}
{%- if version %}, version {{ version }}{% endif %}
{%- if published %}, published {{ published }}{% endif %}.
Licence: {{ licence.name if licence else "not stated" }}
{%- if licence and licence.url %} ({{ link(licence.url) }}){% endif %}.
{% if url %}Page: {{ link(url) }}.{% endif %}</p>
<p>Citation: {{ citation or "not stated" }}</p>
<h2>Counts</h2>
{{ facts([
  ("users", counts.users | count), ("items in the catalogue", counts.catalogue_items | count),
  ("items with interactions", counts.items_with_interactions | count),
  ("interactions", counts.interactions | count),
  ("density: interactions / (users × items with interactions)", counts.density)
]) }}
{% for kind, found in features.items() %}<p>Features of {{ kind }}s:
{% for name, values in found.items() %}{{ name }} ({{ values | count }} values)
{{- ", " if not loop.last }}{% endfor %}.</p>
{% endfor %}
<h2>Rows</h2>
<table><thead><tr><th>rule</th><th>rows dropped</th><th>users dropped</th><th>items dropped</th></tr></thead>
{% for filter in rows.filters %}
<tr><td>{{ filter.rule | rule }}</td><td>{{ filter.dropped.rows | count }}</td>
<td>{{ filter.dropped.users | count }}</td><td>{{ filter.dropped["items"] | count }}</td></tr>
{% else %}<tr><td colspan="4">No rule leaves rows out.</td></tr>
{% endfor %}</table>
<p>{{ rows.raw | count }} rows in the raw file, of which {{ rows.kept | count }} are kept. {{ rows.repeats | count }}
of these repeat a pair of user and item.</p>
<h2>Distributions</h2>
{{ figure | safe }}
<table><thead><tr><th></th>{% for name in quantiles %}<th>{{ name }}</th>{% endfor %}<th>mean</th></tr></thead>
{% for name, found in (("interactions of a user", sequence_length), ("interactions of an item", item_popularity)) %}
<tr><th scope="row">{{ name }}</th>{% for quantile in quantiles %}<td>{{ found[quantile] | count }}</td>{% endfor %}
<td>{{ found.mean | count }}</td></tr>
{% endfor %}</table>
<p class="note">pN: N % of users, or of items with interactions, have at most so many.</p>
{% if ratings %}
<table><thead><tr><th>rating</th><th>rows</th></tr></thead>
{% for bar in ratings.histogram %}
<tr><td>{{ bar.rating if "rating" in bar else bar.from ~ " to " ~ bar.to }}</td><td>{{ bar.rows | count }}</td></tr>
{% endfor %}
{% if ratings.missing %}<tr><td>missing</td><td>{{ ratings.missing | count }}</td></tr>{% endif %}</table>
{% endif %}
<h2>Time and order</h2>
{% if time %}
{{ facts([
  ("first event (UTC)", time.first), ("last event (UTC)", time.last),
  ("rows that share their time with the user's row before", ties.share_of_rows_tied_with_the_row_before | percent),
  ("users whose last two rows share their time, so that the rule decides which is the target",
   ties.share_of_users_with_tied_target | percent)
]) }}
{% else %}<p>The data set has no times.</p>
{% endif %}
<p>A user's rows are ordered by: {{ ties.rule }}.</p>
<h2>Targets of leave-last-out</h2>
<p>A target is a user's last row. Training rows are all other rows, as under protocol <code>paper</code>;
<code>strict</code> holds out one more a user.</p>
{{ facts([("targets", targets.targets | count)]
  + ([
    ("targets earlier than the latest training row of another user",
     targets.share_before_the_latest_training_row_of_others | percent),
    ("training rows later than the median target (" ~ targets.median_time ~ ")",
     targets.share_of_training_rows_after_the_median_target | percent),
    ("targets whose item is in training, but only later than the target",
     targets.share_in_training_only_later | percent)
  ] if time else [])
  + [("targets whose item is in no training row (cold)", targets.share_never_in_training | percent)]) }}
{% if time %}
<p class="note">Each user is split by a clock of their own, so that a model is trained on what other users did after a
target: leave-one-out leaks the future (Ji, Sun, Zhang, Li: A Critical Study on Data Leakage in Recommender System
Offline Evaluation. ACM TOIS 41(3), article 75, 2023, {{ link("https://doi.org/10.1145/3569930") }}). Protocol
<code>temporal</code> has one clock for all. Times are compared in whole seconds; equal ones are not later.</p>
{% endif %}
<h2>Checks that passed</h2>
<table><thead><tr><th>column</th><th>must be</th></tr></thead>
{% for check in checks %}<tr><td>{{ check.column }}</td><td>{{ check.check }}</td></tr>
{% endfor %}</table>
<h2>Files</h2>
{% for source in sources %}<p>Source: <code>{{ source.file }}</code>
{%- if source.url %} from {{ link(source.url) }}{% elif generated %}, generated by this project
{%- else %}, without a publisher's address{% endif %}, SHA-256 <code>{{ source.sha256 }}</code>.</p>
{% endfor %}
<table><thead><tr><th>file</th><th>bytes</th><th>SHA-256</th></tr></thead>
{% for kind, found in files.items() %}{% for name, file in found.items() %}
<tr><td>{{ kind }}: {{ name }}</td><td>{{ file.bytes | count }}</td><td><code>{{ file.sha256 }}</code></td></tr>
{% endfor %}{% endfor %}</table>
<footer><p>Made by the step <code>card</code>; <code>card.json</code> has the same numbers.</p></footer>
</body></html>
"""
)


def render(card: Mapping[str, Any], figure: str) -> str:
    """The page of a card, as card.json has it. figure: SVG that is trusted."""
    return _PAGE.render(card, figure=figure, quantiles=list(QUANTILES)).lstrip() + "\n"


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {number}" for name, number in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
