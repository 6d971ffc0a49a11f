"""Answers with status 200 that are not what was asked for, and a store that gets them."""

from wmtp_storage import S3Storage

KB = 2**10
CONTENT = {"a": b"1" * 30 * KB, "b/c": b"2", "d e": b"3" * 5}
LISTING = (
    '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>{bucket}</Name>'
    "<Prefix>m/</Prefix>{truncated}{objects}</ListBucketResult>"
)
OBJECT = (
    "<Contents><Key>{}</Key><ETag>&#34;1&#34;</ETag><Size>1</Size><LastModified>2026-01-01T00:00:00Z</LastModified></Contents>"
)
MORE = "<IsTruncated>true</IsTruncated>"
NO_MORE = "<IsTruncated>false</IsTruncated>"
XHTML = b'<?xml version="1.0"?><html xmlns="http://www.w3.org/1999/xhtml"><head><title>Log in</title></head><body/></html>'


def storage(proxy, **options):
    return S3Storage(
        endpoint=proxy.endpoint, region="us-east-1", **{"retry_timeout": 0.5, "chunk_size": 16 / 1024} | options
    ).build()


def is_listing(method, path):
    return "list-type" in path


def listing(uri, *keys, truncated=NO_MORE, **changes):
    bucket = changes.get("bucket", uri.split("/")[2])
    text = LISTING.format(bucket=bucket, truncated=truncated, objects="".join(map(OBJECT.format, keys)))
    return text.replace("<Prefix>m/", f"<Prefix>{changes.get('prefix', 'm/')}").encode()


PAGE = {"ETag": '"1"', "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
