"""Masks written out by hand from the rule: a row a query, a column a key, x where the query sees the key.

By `options`, the arguments of `hstu_attention`: W `max_attn_len`, c `contextual_seq_len`, f `min_full_attn_seq_len`, s
`num_sink_tokens`, g `target_group_size`, m this row's `num_targets`, and `both` for `causal=False`. A table's rows are
the queries and its columns the keys; `keys` says their number where the table cannot.
"""

from typing import NamedTuple

NAMES = {
    "W": "max_attn_len",
    "c": "contextual_seq_len",
    "f": "min_full_attn_seq_len",
    "s": "num_sink_tokens",
    "g": "target_group_size",
}


class Table(NamedTuple):
    settings: str
    rows: str
    keys: int | None = None

    def options(self) -> dict[str, int | bool]:
        """Numbers of the mask, under their names as arguments."""
        words = [word for word in self.settings.split() if word != "both" and not word.startswith("m")]
        numbers = {NAMES[word[0]]: int(word[1:]) for word in words}
        return numbers | ({"causal": False} if "both" in self.settings.split() else {})

    def targets(self) -> int | None:
        return next((int(word[1:]) for word in self.settings.split() if word.startswith("m")), None)

    def seen(self) -> list[list[bool]]:
        return [[letter == "x" for letter in row.strip("-")] for row in self.rows.split()]

    def num_keys(self) -> int:
        return len(self.seen()[0]) if self.keys is None else self.keys


TABLES = [
    # Causal.
    Table("", "x"),
    Table("", "x... xx.. xxx. xxxx"),
    # A window.
    Table("W1", "x.... xx... .xx.. ..xx. ...xx"),
    Table("W2", "x.... xx... xxx.. .xxx. ..xxx"),
    Table("W9", "x.. xx. xxx"),
    # A prefix sees the whole history.
    Table("c1", "xx xx"),
    Table("c1", "xxxx xx.. xxx. xxxx"),
    Table("c2", "xxxx xxxx xxx. xxxx"),
    Table("c3", "xxxxxx xxxxxx xxxxxx xxxx.. xxxxx. xxxxxx"),
    Table("c3", "xxx xxx xxx"),
    Table("c3", "x. .x"),
    # What a window keeps from the prefix does not see it; it counts as one.
    Table("c1 W1", "xxxx xx.. .xx. ..xx"),
    Table("c2 W1", "xxxxx xxxxx xxx.. ..xx. ...xx"),
    Table("c2 W2", "xxxxx xxxxx xxx.. xxxx. ..xxx"),
    # Candidates see the history and themselves.
    Table("m2", "x.... xx... xxx.. xxxx. xxx.x"),
    Table("m3", "x.. .x. ..x"),
    Table("m5", "x.. .x. ..x"),
    Table("m0", "x.. xx. xxx"),
    Table("m2 W1", "x.... xx... .xx.. ..xx. ..x.x"),
    Table("c1 m1 W1", "xx. xx. .xx"),
    Table("c2 m2", "xxxx.. xxxx.. xxx... xxxx.. xxxxx. xxxx.x"),
    Table("c2 m2 W1", "xxxx.. xxxx.. xxx... ..xx.. ...xx. ...x.x"),
    Table("c2 m2 W2", "xxxx.. xxxx.. xxx... xxxx.. ..xxx. ..xx.x"),
    Table("c3 m3", "x.... .x... ..x.. ...x. ....x"),
    Table("c2 m2", "xx.. xx.. xxx. xx.x"),
    # The newest see everything, and so do candidates.
    Table("W1 f2", "x..... xx.... .xx... ..xx.. xxxxx. xxxxxx"),
    Table("W1 f1 m2", "x..... xx.... .xx... xxxx.. xxxxx. xxxx.x"),
    Table("W1 f9", "x... xx.. xxx. xxxx"),
    Table("W1 f1 c2", "xxxxxx xxxxxx xxx... ..xx.. ...xx. xxxxxx"),
    Table("W1 f1 c2 m1", "xxxxx. xxxxx. xxx... ..xx.. xxxxx. xxxxxx"),
    # The first keys are seen from anywhere.
    Table("W1 s1", "x..... xx.... xxx... x.xx.. x..xx. x...xx"),
    Table("W2 s2", "x..... xx.... xxx... xxxx.. xxxxx. xx.xxx"),
    Table("W1 s9", "x.... xx... xxx.. xxxx. xxxxx"),
    Table("W1 s2 m2", "x..... xx.... xxx... xxxx.. xx.xx. xx.x.x"),
    Table("W1 s4 m4", "x..... xx.... xxx... xx.x.. xx..x. xx...x"),
    Table("W1 s1 c2", "xxxxxx xxxxxx xxx... x.xx.. x..xx. x...xx"),
    Table("W1 s1 f1", "x..... xx.... xxx... x.xx.. x..xx. xxxxxx"),
    # Both ways.
    Table("both", "xxxx xxxx xxxx xxxx"),
    Table("both W1", "xx... xxx.. .xxx. ..xxx ...xx"),
    Table("both m2", "xxxxx xxxxx xxxxx xxxx. xxx.x"),
    Table("both m2 W1", "xx... xxx.. .xxxx ..xx. ..x.x"),
    Table("both c2", "xxxxx xxxxx xxxxx xxxxx xxxxx"),
    Table("both c2 m2", "xxxxxx xxxxxx xxxxxx xxxxxx xxxxx. xxxx.x"),
    Table("both c2 m1 W1", "xxxxx. xxxxx. xxxx.. ..xxx. ...xxx ....xx"),
    Table("both W1 s1", "xx.... xxx... xxxx.. x.xxx. x..xxx x...xx"),
    Table("both W1 f1", "xx.... xxx... .xxx.. ..xxx. ...xxx xxxxxx"),
    Table("both W1 f1 m2", "xx... xxx.. xxxxx xxxx. xxx.x"),
    # Groups of candidates.
    Table("m4 g2", "x..... xx.... xxx... xxxx.. xx..x. xx..xx"),
    Table("m5 g3", "x..... xx.... xxx... xxxx.. x...x. x...xx"),
    Table("m4 g9", "x.... xx... xxx.. xxxx. xxxxx"),
    Table("m4 g2 W1", "x..... xx.... .xx... .xxx.. .x..x. .x..xx"),
    Table("m4 g2 W1 s1", "x..... xx.... xxx... xxxx.. xx..x. xx..xx"),
    Table("m4 g2 c1", "xx.... xx.... xxx... xxxx.. xx..x. xx..xx"),
    Table("m4 g2 both", "xxxxxx xxxxxx xxxx.. xxxx.. xx..xx xx..xx"),
    # Queries and keys of different numbers: the last query stands where the last key does.
    Table("", "xxxx. xxxxx"),
    Table("", ".. .. .. x. xx"),
    Table("", "- -", keys=0),
    Table("", "", keys=3),
    Table("W1", "..xx. ...xx"),
    Table("m2", "xxx.. xxxx. xxx.x"),
    Table("m2", "... x.. xx. x.x"),
    Table("both", "xxxxx xxxxx xxxxx"),
    Table("both", ".. .. xx xx"),
    Table("both m1 W1", ".. .. xx xx"),
    Table("W1 s1", "x.xx. x..xx"),
    Table("W1 f1", "..xx.. ...xx. xxxxxx"),
    Table("c2", "xxxxx xxx.. xxxx. xxxxx"),
    Table("c1", "... xxx xx. xxx"),
    Table("m4 g2", "xxxx.. xx..x. xx..xx"),
]
