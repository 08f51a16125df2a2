/* Threads that work on one job together, phase by phase. */
#pragma once

/* Runs work(context, thread) once on each of `threads` threads, the caller's own among them as thread 0; returns when all are done.
One job runs at a time; calls from several threads wait for each other. Returns 0, or an error number when a thread cannot be made. */
int run_together(void (*work)(void *context, int thread), void *context, int threads);

/* Waits until all threads of the job are here. What one wrote before, all read after. */
void meet(void);

/* Hands out 0, 1, 2 ... to the threads of the job, each number once; it starts anew after every meeting. */
int next_share(void);
