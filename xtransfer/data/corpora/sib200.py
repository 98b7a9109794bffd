"""SIB-200: topics of single sentences in 205 languages, parallel by their ids.

Adelani et al., "SIB-200: A Simple, Inclusive, and Big Evaluation Dataset for Topic Classification in 200+ Languages and
Dialects", EACL 2024. Each language has 701, 99, and 204 sentences; the categories are not balanced.
"""

import csv
from collections.abc import Iterator
from typing import BinaryIO

from xtransfer.data.corpora import archives
from xtransfer.data.corpora.corpus import Corpus, CorpusRow, Download, Sources
from xtransfer.data.formats import lines
from xtransfer.errors import DataError

_LANGUAGES = """
ace_Arab ace_Latn acm_Arab acq_Arab aeb_Arab afr_Latn ajp_Arab aka_Latn als_Latn amh_Ethi apc_Arab arb_Arab
arb_Latn ars_Arab ary_Arab arz_Arab asm_Beng ast_Latn awa_Deva ayr_Latn azb_Arab azj_Latn bak_Cyrl bam_Latn
ban_Latn bel_Cyrl bem_Latn ben_Beng bho_Deva bjn_Arab bjn_Latn bod_Tibt bos_Latn bug_Latn bul_Cyrl cat_Latn
ceb_Latn ces_Latn cjk_Latn ckb_Arab crh_Latn cym_Latn dan_Latn deu_Latn dik_Latn dyu_Latn dzo_Tibt ell_Grek
eng_Latn epo_Latn est_Latn eus_Latn ewe_Latn fao_Latn fij_Latn fin_Latn fon_Latn fra_Latn fur_Latn fuv_Latn
gaz_Latn gla_Latn gle_Latn glg_Latn grn_Latn guj_Gujr hat_Latn hau_Latn heb_Hebr hin_Deva hne_Deva hrv_Latn
hun_Latn hye_Armn ibo_Latn ilo_Latn ind_Latn isl_Latn ita_Latn jav_Latn jpn_Jpan kab_Latn kac_Latn kam_Latn
kan_Knda kas_Arab kas_Deva kat_Geor kaz_Cyrl kbp_Latn kea_Latn khk_Cyrl khm_Khmr kik_Latn kin_Latn kir_Cyrl
kmb_Latn kmr_Latn knc_Arab knc_Latn kon_Latn kor_Hang lao_Laoo lij_Latn lim_Latn lin_Latn lit_Latn lmo_Latn
ltg_Latn ltz_Latn lua_Latn lug_Latn luo_Latn lus_Latn lvs_Latn mag_Deva mai_Deva mal_Mlym mar_Deva min_Arab
min_Latn mkd_Cyrl mlt_Latn mni_Beng mos_Latn mri_Latn mya_Mymr nld_Latn nno_Latn nob_Latn npi_Deva nqo_Nkoo
nso_Latn nus_Latn nya_Latn oci_Latn ory_Orya pag_Latn pan_Guru pap_Latn pbt_Arab pes_Arab plt_Latn pol_Latn
por_Latn prs_Arab quy_Latn ron_Latn run_Latn rus_Cyrl sag_Latn san_Deva sat_Olck scn_Latn shn_Mymr sin_Sinh
slk_Latn slv_Latn smo_Latn sna_Latn snd_Arab som_Latn sot_Latn spa_Latn srd_Latn srp_Cyrl ssw_Latn sun_Latn
swe_Latn swh_Latn szl_Latn tam_Taml taq_Latn taq_Tfng tat_Cyrl tel_Telu tgk_Cyrl tgl_Latn tha_Thai tir_Ethi
tpi_Latn tsn_Latn tso_Latn tuk_Latn tum_Latn tur_Latn twi_Latn tzm_Tfng uig_Arab ukr_Cyrl umb_Latn urd_Arab
uzn_Latn vec_Latn vie_Latn war_Latn wol_Latn xho_Latn ydd_Hebr yor_Latn yue_Hant zho_Hans zho_Hant zsm_Latn
zul_Latn
"""
LANGUAGES = tuple(_LANGUAGES.split())
LABELS = ("entertainment", "geography", "health", "politics", "science/technology", "sports", "travel")
COLUMNS = ("index_id", "category", "text")
SPLITS = ("train", "dev", "test")

# A commit, so that the files never change.
_RAW = "https://raw.githubusercontent.com/dadelani/sib-200/e7a172159963fd28c65f1ea53a0cea931bd08719/data/annotated"
_MEMBER_LIMIT = 16 << 20  # the largest file has a third of a megabyte
_TOTAL_LIMIT = 2 << 30  # for an archive of the whole repository


def parse(stream: BinaryIO, name: str) -> Iterator[CorpusRow]:
    """Yield the rows of a file.

    Columns end at tabs. A cell with a quote is quoted, and its own quotes are doubled, as pandas writes them. Reading
    without quoting would leave the quotes in the text. No cell has a line break.

    Args:
      stream: UTF-8, with the header `index_id category text`.
      name: the name of the file, for errors.

    Raises:
      UserError: a malformed row; the message starts with `name`:line.
    """
    header: list[str] | None = None
    for line, text in lines.lines(stream, name):
        where = f"{name}:{line}"
        try:
            cells = next(csv.reader([text.removesuffix("\n").removesuffix("\r")], delimiter="\t", strict=True), [])
        except csv.Error as error:
            raise DataError(f"{where}: malformed TSV: {error}; download the file again") from None
        if header is None:
            header = cells
            if tuple(header) != COLUMNS:
                raise DataError(f"{where}: the columns are {', '.join(header)}, expected {', '.join(COLUMNS)}")
        elif len(cells) != len(COLUMNS):
            raise DataError(f"{where}: {len(cells)} columns, expected {len(COLUMNS)}")
        else:
            yield CorpusRow(id=cells[0], text=cells[2], text_pair=None, label=cells[1], where=where)


def _downloads(language: str) -> tuple[Download, ...]:
    names = (f"{language}/{split}.tsv" for split in SPLITS)
    return tuple(Download(url=f"{_RAW}/{name}", filename=name) for name in names)


def _rows(sources: Sources, language: str, split: str) -> Iterator[CorpusRow]:
    name = f"{language}/{split}.tsv"
    with archives.open_member(sources.path(name), name, member_limit=_MEMBER_LIMIT, total_limit=_TOTAL_LIMIT) as (
        member,
        stream,
    ):
        yield from parse(stream, member)


CORPORA = (
    Corpus(
        name="sib200",
        version="1.0.0",
        labels=LABELS,
        source_language="eng_Latn",
        languages=LANGUAGES,
        splits=lambda language: SPLITS,
        downloads=_downloads,
        members=lambda language: tuple(f"{language}/{split}.tsv" for split in SPLITS),
        rows=_rows,
        homepage="https://github.com/dadelani/sib-200",
        citation="Adelani et al., SIB-200, EACL 2024, arXiv 2309.07445",
        licence="Apache-2.0; the sentences are from FLORES-200, CC BY-SA 4.0",
        is_parallel=True,
    ),
)
