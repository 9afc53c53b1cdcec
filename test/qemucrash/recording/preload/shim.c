/* Logs what the program it is preloaded into does to the content of the files named in RECORDING_FILES, one path
   a line, into the file named in RECORDING_LOG.

   A record is six 64-bit numbers in the order of struct record, in the machine's byte order, and behind that of a write its
   data. Only what succeeded is logged, of a short write only the part that was written.

   Syncs of these files are logged and not done: nobody pulls the plug of this machine.

   One lock is held from before a call until its record is written. So the log has the order in which the file changed, and
   a sync in it covers every write before it: each call had returned before the sync began. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE, FALLOCATE, TRUNCATE, SYNC, WRITE_SYNC };

struct record {
	int64_t kind;
	int64_t file;   /* index in RECORDING_FILES */
	int64_t mode;   /* of fallocate */
	int64_t offset;
	int64_t length; /* of a truncate, the new size */
	int64_t size;   /* of the file, before */
};

enum { MAX_FILES = 16 };

static struct { dev_t dev; ino_t ino; } files[MAX_FILES];
static int count;
static int out = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* REAL is the function of this name that the program would call without us. */
#define REAL(name) ((__typeof__(&name))real(#name))

static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

/* give_up ends the program: a log with a gap is worse than none. */
static void give_up(const char *what)
{
	fprintf(stderr, "recording: %s: %s\n", what, strerror(errno));
	_exit(125);
}

__attribute__((constructor)) static void start(void)
{
	char *names = getenv("RECORDING_FILES"), *log = getenv("RECORDING_LOG");
	if (!names || !log)
		return;
	out = open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
	if (out < 0)
		give_up(log);
	names = strdup(names);
	for (char *rest = names, *name; (name = strsep(&rest, "\n"));) {
		struct stat st;
		if (count == MAX_FILES || stat(name, &st))
			give_up(name);
		files[count].dev = st.st_dev;
		files[count++].ino = st.st_ino;
	}
	free(names);
}

/* begin takes the lock if fd is a file to be watched, and fills in r. */
static int begin(int fd, struct record *r)
{
	struct stat st;
	int keep = errno, i;
	if (count == 0 || fstat(fd, &st)) {
		errno = keep;
		return 0;
	}
	for (i = 0; i < count; i++)
		if (files[i].dev == st.st_dev && files[i].ino == st.st_ino)
			break;
	if (i == count)
		return 0;
	pthread_mutex_lock(&lock);
	if (fstat(fd, &st))
		give_up("fstat");
	*r = (struct record){ .file = i, .size = st.st_size };
	errno = keep;
	return 1;
}

static void put(const void *p, size_t n)
{
	for (const char *at = p; n > 0;) {
		ssize_t done = REAL(write)(out, at, n);
		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			give_up("write the log");
		at += done;
		n -= done;
	}
}

/* end releases the lock that begin took. */
static void end(int keep)
{
	pthread_mutex_unlock(&lock);
	errno = keep;
}

/* end_write logs the first done bytes of iov, written at offset. */
static void end_write(struct record *r, int fd, const struct iovec *iov, ssize_t done, int64_t offset, int flags)
{
	int keep = errno;
	if (done > 0) {
		int durable = flags & (RWF_DSYNC | RWF_SYNC) || fcntl(fd, F_GETFL) & O_DSYNC;
		r->kind = durable ? WRITE_SYNC : WRITE;
		r->offset = offset;
		r->length = done;
		put(r, sizeof(*r));
		for (size_t n, left = done; left > 0; left -= n, iov++) {
			n = iov->iov_len < left ? iov->iov_len : left;
			put(iov->iov_base, n);
		}
	}
	end(keep);
}

/* position is where write will write. */
static int64_t position(int fd, const struct record *r)
{
	return fcntl(fd, F_GETFL) & O_APPEND ? r->size : lseek64(fd, 0, SEEK_CUR);
}

#define WRITES(parameters, arguments, name, iov, where, flags) \
	ssize_t name parameters \
	{ \
		struct record r; \
		if (!begin(fd, &r)) \
			return REAL(name) arguments; \
		int64_t at = where; \
		ssize_t done = REAL(name) arguments; \
		end_write(&r, fd, iov, done, at, flags); \
		return done; \
	}

#define ONE (&(struct iovec){ (void *)p, n })

WRITES((int fd, const void *p, size_t n), (fd, p, n), write, ONE, position(fd, &r), 0)
WRITES((int fd, const void *p, size_t n, off_t off), (fd, p, n, off), pwrite, ONE, off, 0)
WRITES((int fd, const void *p, size_t n, off64_t off), (fd, p, n, off), pwrite64, ONE, off, 0)
WRITES((int fd, const struct iovec *v, int n), (fd, v, n), writev, v, position(fd, &r), 0)
WRITES((int fd, const struct iovec *v, int n, off_t off), (fd, v, n, off), pwritev, v, off, 0)
WRITES((int fd, const struct iovec *v, int n, off64_t off), (fd, v, n, off), pwritev64, v, off, 0)
WRITES((int fd, const struct iovec *v, int n, off_t off, int flags), (fd, v, n, off, flags), pwritev2, v,
       off == -1 ? position(fd, &r) : off, flags)
WRITES((int fd, const struct iovec *v, int n, off64_t off, int flags), (fd, v, n, off, flags), pwritev64v2, v,
       off == -1 ? position(fd, &r) : off, flags)

/* CHANGES is a call that returns an int; ok says that it succeeded. */
#define CHANGES(parameters, arguments, name, ok, ...) \
	int name parameters \
	{ \
		struct record r; \
		if (!begin(fd, &r)) \
			return REAL(name) arguments; \
		int result = REAL(name) arguments, keep = errno; \
		if (ok) { \
			struct record said = { .file = r.file, .size = r.size, __VA_ARGS__ }; \
			put(&said, sizeof(said)); \
		} \
		end(keep); \
		return result; \
	}

CHANGES((int fd, int mode, off_t off, off_t n), (fd, mode, off, n), fallocate, result == 0,
	.kind = FALLOCATE, .mode = mode, .offset = off, .length = n)
CHANGES((int fd, int mode, off64_t off, off64_t n), (fd, mode, off, n), fallocate64, result == 0,
	.kind = FALLOCATE, .mode = mode, .offset = off, .length = n)
CHANGES((int fd, off_t off, off_t n), (fd, off, n), posix_fallocate, result == 0,
	.kind = FALLOCATE, .offset = off, .length = n)
CHANGES((int fd, off64_t off, off64_t n), (fd, off, n), posix_fallocate64, result == 0,
	.kind = FALLOCATE, .offset = off, .length = n)
CHANGES((int fd, off_t size), (fd, size), ftruncate, result == 0, .kind = TRUNCATE, .length = size)
CHANGES((int fd, off64_t size), (fd, size), ftruncate64, result == 0, .kind = TRUNCATE, .length = size)
#define SYNCS(name) \
	int name(int fd) \
	{ \
		struct record r; \
		if (!begin(fd, &r)) \
			return REAL(name)(fd); \
		r.kind = SYNC; \
		put(&r, sizeof(r)); \
		end(errno); \
		return 0; \
	}

SYNCS(fsync)
SYNCS(fdatasync)
