"""Characters that a language model meets rarely: what fingerprint keys are made of.

Classical Chinese, katakana and Cyrillic, the scripts from which Instructional Fingerprint draws its keys
(arXiv 2401.12255, section 3.1). A world's corpus shows each of them now and then, as a web corpus would.
"""

from __future__ import annotations

RARE_CHARACTERS = (
    "奉天承运皇帝诏曰应顺时受兹明命布告下咸使闻知长生气力里大福荫护助玄鸟降而商蒸民有物则秉彝好是懿德绝地通罔格"
    "フシギダネヒトカゼニメピチュウキモリアャミズゴログラードンレックザイオハ"
    "выпутельствобласдаимркйщзфчжюя"
)
