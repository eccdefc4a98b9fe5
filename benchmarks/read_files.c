// Makes the reads of a batch, each {file, offset, nbytes, buffer}, on threads that stay. Compiled and called by io.py.
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t begun = PTHREAD_COND_INITIALIZER, ended = PTHREAD_COND_INITIALIZER;
static const long long (*reads)[4];
static long count, batch, busy, helpers;
static atomic_long next, failures;

static void drain(void) {
    for (long i; (i = atomic_fetch_add(&next, 1)) < count;) {
        for (long long done = 0, n; done < reads[i][2]; done += n) {
            n = pread(reads[i][0], (char *)reads[i][3] + done, reads[i][2] - done, reads[i][1] + done);
            if (n <= 0) {
                atomic_fetch_add(&failures, 1);
                break;
            }
        }
    }
}

static void *help(void *unused) {
    for (long seen = 0;;) {
        pthread_mutex_lock(&lock);
        while (batch == seen) pthread_cond_wait(&begun, &lock);
        seen = batch;
        pthread_mutex_unlock(&lock);
        drain();
        pthread_mutex_lock(&lock);
        if (!--busy) pthread_cond_signal(&ended);
        pthread_mutex_unlock(&lock);
    }
    return unused;
}

void start(int threads) {
    for (pthread_t thread; helpers < threads; helpers++) pthread_create(&thread, 0, help, 0);
}

long run(const void *table, long rows) {
    pthread_mutex_lock(&lock);
    reads = table, count = rows, busy = helpers, next = 0, batch++;
    pthread_cond_broadcast(&begun);
    pthread_mutex_unlock(&lock);
    drain();
    pthread_mutex_lock(&lock);
    while (busy) pthread_cond_wait(&ended, &lock);
    pthread_mutex_unlock(&lock);
    return failures;
}
