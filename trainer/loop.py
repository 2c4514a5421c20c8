"""S2L-PO, Algorithm 1 of arXiv:2605.30789. Its line numbers stand at the right."""

from core.configfile import Command
from trainer.session import Session


def train(command: Command) -> None:
    """Train π_θ from its checkpoint or its beginning to step T.

    `lookahead` steps of the learner's rollouts may be in flight while a step trains; 0 is Algorithm 1 to the letter.
    """
    with Session(command) as session:  #                                        π_θ, frozen π_ω, D, r_φ
        algorithm, learner, stream = session.config.algorithm, session.learner, session.stream
        session.evaluate_first()
        for step in range(learner.step + 1, algorithm.steps + 1):  #             1
            for ahead in range(step, min(step + algorithm.lookahead, algorithm.steps) + 1):
                stream.request(ahead)  #                                         2-15  G_w from π_ω, G_s from π_θ
            for mini_batch in session.updates.of(step):  #                       16-19 rewards, advantages
                learner.update(mini_batch)  #                                    20
            metrics = learner.end_step()  #                                      21
            stream.publish(learner)
            session.finish(step, metrics)  #                                     22-23 evaluation, checkpoint
        session.heed_signals()
