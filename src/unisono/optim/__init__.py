"""Optimizers with hyperparameters per member: training an ensemble equals N solo trainings."""

from unisono.optim.algorithms import SGD as SGD
from unisono.optim.algorithms import Adam as Adam
from unisono.optim.algorithms import AdamW as AdamW
from unisono.optim.algorithms import RMSprop as RMSprop
from unisono.optim.optimizer import MemberOptimizer as MemberOptimizer
