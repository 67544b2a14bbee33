"""From a trained network to a report of its posterior."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from laplace_debiased import Laplace

# a trained network, and its data: use yours
torch.manual_seed(0)
images, digits = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
data = TensorDataset(images.float() / 16, digits)
train, val, test = (
    DataLoader(part, 50) for part in random_split(data, [900, 400, 497])
)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
for _ in range(20):
    for x, y in train:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

# its posterior, and what it is worth
la = Laplace(model, "classification", "all", "kron_debiased", budget=128)
la.fit(train)
print(la.calibrate(val))
shuffled = data.tensors[0][:, torch.randperm(64)]  # images of nothing
print(la.report(test, foreign_loader=shuffled.split(50)))
